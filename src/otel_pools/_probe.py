"""Asks an OTLP endpoint whether it takes metrics, as the exporter would: an empty export, over HTTP or gRPC."""

from __future__ import annotations

import base64
import importlib
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException, InvalidURL
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

METHOD = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
PATH = "v1/metrics"
HTTP, GRPC = "http/protobuf", "grpc"
DEFAULTS = {HTTP: "http://localhost:4318", GRPC: "http://localhost:4317"}
# The port of the other protocol, which is the commonest mistake.
OTHER = {HTTP: 4317, GRPC: 4318}
SECONDS = 2.0
# Of kinds that contain each other the narrower comes first.
REASONS: dict[type[BaseException], str] = {
    ssl.SSLError: "it does not speak TLS as we do; is it http:// and not https://?",
    TimeoutError: "it does not answer in time",
    socket.gaierror: "its name is not known",
    ConnectionRefusedError: "nobody listens there",
    FileNotFoundError: "a file of OTEL_EXPORTER_OTLP_*CERTIFICATE or *KEY is not there",
}


@dataclass(frozen=True, slots=True)
class Target:
    """
    Where the metrics go, as the environment says.

    Attributes:
        protocol: ``http/protobuf`` or ``grpc``.
        url: For HTTP with its path; it may hold a user and a password, `shown` does not.
        headers: Which may hold credentials; never to be shown.
        insecure: For gRPC: whether in clear.
        certificate, client_certificate, client_key: Files.
    """

    protocol: str
    url: str
    headers: Mapping[str, str]
    insecure: bool = False
    certificate: str | None = None
    client_certificate: str | None = None
    client_key: str | None = None

    def __repr__(self) -> str:
        return f"<Target {self.shown} over {self.protocol}>"

    @property
    def shown(self) -> str:
        """Its scheme, host and port: what else stands in a URL may be secret."""
        parts = self.parts
        scheme = f"{parts.scheme}://" if parts.scheme else ""
        return f"{scheme}{parts.hostname or ''}{f':{self.port}' if self.port else ''}"

    @property
    def parts(self) -> SplitResult:
        """The URL in pieces, none if it is no URL; gRPC's may lack a scheme."""
        try:
            return urlsplit(self.url if "://" in self.url else f"//{self.url}")
        except ValueError:
            return urlsplit("//")

    @property
    def port(self) -> int | None:
        """None if it has none, or what stands there is no port."""
        try:
            return self.parts.port
        except ValueError:
            return None


def target(environ: Mapping[str, str], protocol: str) -> Target:
    """Where an exporter of this protocol would send metrics; the variables for metrics alone come first."""

    def said(name: str) -> str | None:
        return environ.get(f"OTEL_EXPORTER_OTLP_METRICS_{name}") or environ.get(f"OTEL_EXPORTER_OTLP_{name}")

    own = environ.get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT")
    url = own or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or DEFAULTS[protocol]
    if protocol == HTTP and not own:
        url = f"{url.rstrip('/')}/{PATH}"
    insecure = (said("INSECURE") or str(url.startswith("http://"))).lower() == "true" and not url.startswith("https://")
    headers = _headers(said("HEADERS") or "")
    files = said("CERTIFICATE"), said("CLIENT_CERTIFICATE"), said("CLIENT_KEY")
    return Target(protocol, url.strip(), headers, insecure, *files)


def _headers(text: str) -> dict[str, str]:
    pairs = (pair.split("=", 1) for pair in text.split(",") if "=" in pair)
    return {unquote(name).strip().lower(): unquote(value).strip() for name, value in pairs}


def ask(target: Target, seconds: float = SECONDS) -> str | None:
    """Why the endpoint does not take metrics, in words without secrets; None if it does."""
    try:
        return _ask_grpc(target, seconds) if target.protocol == GRPC else _ask_http(target, seconds)
    except (OSError, HTTPException, ValueError) as error:
        return _told(error, target)


def _told(error: BaseException, target: Target) -> str:
    """Not the message of the error, which may quote a URL or a header."""
    reason = getattr(error, "reason", error)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({reason.verify_message}); see OTEL_EXPORTER_OTLP_CERTIFICATE"
    if isinstance(reason, InvalidURL):
        return "it is no URL"
    if isinstance(reason, HTTPException | ConnectionResetError | ConnectionAbortedError):
        return f"it does not speak {target.protocol}{_hint(target)}"
    known = (text for kind, text in REASONS.items() if isinstance(reason, kind))
    return next(known, f"it cannot be asked ({type(reason).__name__})")


def _hint(target: Target) -> str:
    wrong = target.port == OTHER[target.protocol]
    return f"; port {OTHER[target.protocol]} is usually for the other protocol" if wrong else ""


# -- over HTTP ---------------------------------------------------------------------------------


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """What we send, credentials for one, is for this server alone."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _ask_http(target: Target, seconds: float) -> str | None:
    parts = target.parts
    if parts.scheme not in {"http", "https"}:
        return "it must begin with http:// or https://"
    headers = {"Content-Type": "application/x-protobuf", **_credentials(target.url), **target.headers}
    plain = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    request = urllib.request.Request(plain, b"", headers, method="POST")  # noqa: S310  # its scheme is known
    # The proxies of the environment are asked, as the exporter asks them.
    opener = urllib.request.build_opener(_NoRedirect, urllib.request.HTTPSHandler(context=_context(target)))
    try:
        with opener.open(request, timeout=seconds):
            return None
    except urllib.error.HTTPError as error:
        with error:
            return _refused(error.code)


def _credentials(url: str) -> dict[str, str]:
    parts = urlsplit(url)
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


def _context(target: Target) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=target.certificate)
    if target.client_certificate:
        context.load_cert_chain(target.client_certificate, target.client_key)
    return context


def _refused(status: int) -> str:
    known = {401: "it wants credentials", 403: "it refuses our credentials", 404: "it has nothing at this path"}
    hints = {401: "OTEL_EXPORTER_OTLP_HEADERS", 403: "OTEL_EXPORTER_OTLP_HEADERS", 404: "the end of the endpoint"}
    if status in known:
        return f"{known[status]} (HTTP {status}); see {hints[status]}"
    return f"it answers with HTTP {status}"


# -- over gRPC ---------------------------------------------------------------------------------


def _ask_grpc(target: Target, seconds: float) -> str | None:
    try:
        grpc: Any = importlib.import_module("grpc")  # not everybody has it, and it has no types
    except ModuleNotFoundError:
        return "it cannot be asked: grpcio is not installed"
    where = target.parts.netloc.rpartition("@")[2]
    channel = (
        grpc.insecure_channel(where)
        if target.insecure
        else grpc.secure_channel(where, _channel_credentials(grpc, target))
    )
    with channel:
        export = channel.unary_unary(METHOD)
        try:
            export(b"", timeout=seconds, metadata=tuple(target.headers.items()))
        except grpc.RpcError as error:
            return _code(error.code().name, target)
    return None


def _channel_credentials(grpc: Any, target: Target) -> Any:
    names = target.certificate, target.client_key, target.client_certificate
    return grpc.ssl_channel_credentials(*(_bytes(name) for name in names))


def _bytes(name: str | None) -> bytes | None:
    if not name:
        return None
    with open(name, "rb") as file:  # noqa: PTH123  # as it stands in the environment
        return file.read()


def _code(code: str, target: Target) -> str:
    how = "in clear" if target.insecure else "with TLS"
    if not target.parts.scheme and not target.insecure:
        how += ", which is meant where no scheme is written; http:// is in clear"
    known = {
        "UNAUTHENTICATED": "it wants credentials; see OTEL_EXPORTER_OTLP_HEADERS",
        "PERMISSION_DENIED": "it refuses our credentials; see OTEL_EXPORTER_OTLP_HEADERS",
        "UNIMPLEMENTED": f"it takes no metrics over gRPC{_hint(target)}",
        "DEADLINE_EXCEEDED": f"it does not answer in time{_hint(target)}",
        "UNAVAILABLE": f"it cannot be reached over gRPC {how}{_hint(target)}",
    }
    return known.get(code, f"it answers with gRPC status {code}")
