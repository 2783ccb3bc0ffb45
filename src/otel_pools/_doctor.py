"""The command `otel-pools doctor`: looks for the reason why a pool would not be seen, and says what to do."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from . import _vocabulary as words
from ._config import _READ, PREFIX, Settings
from ._doors import INSTRUMENTORS, _conflict, _is_there
from ._probe import GRPC, HTTP, Target, ask, target
from ._registry import Registry
from ._spans import Spans
from ._version import __version__
from .targets import LIBRARIES
from .targets import Target as Table

OK, NOTE, PROBLEM = "ok", "note", "problem"

DIST = "otel-pools"
OURS = "otel_pools_"  # what the names of our entry points begin with
GROUP = "opentelemetry_instrumentor"
DISABLED = "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS"
CONFIG_FILES = ("OTEL_CONFIG_FILE", "OTEL_EXPERIMENTAL_CONFIG_FILE")
ENDPOINTS = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
HISTOGRAMS = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION"
INSTALL = "pip install 'otel-pools[otlp]'"
EXPORTERS = {GRPC: "otlp_proto_grpc", HTTP: "otlp_proto_http"}
# From this version on the SDK gives each process a `service.instance.id`, a forked one too.
INSTANCE_SINCE = "1.45"
PREFORK = ("gunicorn", "uwsgi", "celery")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
MILLISECONDS = 60_000


@dataclass(frozen=True, slots=True)
class Finding:
    """
    One thing that was looked at.

    Attributes:
        level: ``ok``, ``note`` (worth knowing) or ``problem`` (something goes unseen).
        area: What it is about, as in ``endpoint``.
        what: In one sentence, without any value that may be secret.
        do: What to do about it, if there is anything.
    """

    level: str
    area: str
    what: str
    do: str | None = None


Environ = Mapping[str, str]
Found = Iterator[tuple[str, str, str | None]]  # level, what, do


def examine(environ: Environ) -> list[Finding]:
    """Look at everything, and change nothing. Never raises: what cannot be looked at is a note."""
    found = []
    for area, check in CHECKS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found += [Finding(level, area, what, do) for level, what, do in check(environ)]
            except Exception as error:
                found.append(Finding(NOTE, area, f"this could not be looked at ({type(error).__name__})"))
    return found


def as_json(findings: list[Finding]) -> str:
    """For programs: whether all is well, and all findings."""
    well = not any(finding.level == PROBLEM for finding in findings)
    return json.dumps({"version": __version__, "ok": well, "findings": [asdict(one) for one in findings]}, indent=2)


def as_text(findings: list[Finding]) -> str:
    """For people: the findings by area, and how many ask for something."""
    lines, area = [], ""
    for one in findings:
        if one.area != area:
            area = one.area
            lines.append(area)
        lines.append(f"  {one.level.upper() if one.level == PROBLEM else one.level:8} {one.what}")
        lines += [f"           -> {one.do}"] if one.do else []
    counts = {level: sum(one.level == level for one in findings) for level in (PROBLEM, NOTE)}
    return "\n".join((*lines, "", ", ".join(f"{level}s: {count}" for level, count in counts.items())))


# -- what is installed -------------------------------------------------------------------------


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions(environ: Environ) -> Found:
    yield OK, f"{DIST} {__version__}, {platform.python_implementation()} {platform.python_version()}", None
    there = {
        canonicalize_name(name): one
        for one in importlib.metadata.distributions()
        if (name := one.metadata["Name"]) and (name.startswith("opentelemetry") or canonicalize_name(name) == DIST)
    }
    for name in sorted(there.keys() - {DIST}):
        yield OK, f"{name} {there[name].version}", None
    if DIST not in there:
        yield PROBLEM, f"{DIST} is not installed as a package: nothing loads it by itself", f"pip install {DIST}"
    for name, one in sorted(there.items()):
        for wanted in _unmet(one.requires or ()):
            have = f"there is {_version(wanted.name)}" if _version(wanted.name) else "it is not there"
            yield (
                PROBLEM,
                f"{name} {one.version} wants {wanted}, and {have}",
                "pip check; pip install -U the two together",
            )


def _unmet(requires: Iterable[str]) -> Iterator[Requirement]:
    """Those requirements that are not optional and not met."""
    for text in requires:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        have = _version(wanted.name)
        if have is None or not wanted.specifier.contains(have, prereleases=True):
            yield wanted


def _libraries(environ: Environ) -> Found:
    modules = {module: text for library in LIBRARIES.values() for module, text in library.modules.items()}
    there = [module for module in modules if _is_there(module)]
    for module in there:
        wanted = Requirement(modules[module])
        conflict = _conflict(modules[module])
        if conflict is None:
            yield OK, f"{wanted.name} {_version(wanted.name) or '(version unknown)'}", None
        else:
            yield PROBLEM, f"{conflict.found} is too old to be watched", f"pip install '{wanted}'"
    if not there:
        yield NOTE, f"there is none of the libraries that can be watched: {', '.join(modules)}", None


# -- do our hooks fit -----------------------------------------------------------------------------


def _hooks(environ: Environ) -> Found:
    for name, library in LIBRARIES.items():
        modules = [module for module in library.modules if _is_there(module) and not _conflict(library.modules[module])]
        if INSTRUMENTORS[name]().is_instrumented_by_opentelemetry:
            yield OK, f"{name} is being watched in this very process", None
            continue
        for module in modules:
            yield from _fits(module, library.target, _settings(environ))


def _fits(module: str, where: str, settings: Settings) -> Found:
    try:
        importlib.import_module(module)
        table: Table = importlib.import_module(where).TARGET
    except Exception as error:
        yield PROBLEM, f"{module} cannot be imported ({type(error).__name__})", f"python -c 'import {module}' says why"
        return
    rows = table.hooks[module]
    misfits = _dry_run(table, module, settings)
    for place in misfits:
        yield (
            PROBLEM,
            f"{module} {_version(module) or ''} has no {place}, to which we would attach: something of it goes unseen",
            f"pip install -U {DIST}, or tell us",
        )
    if not misfits:
        yield OK, f"{module}: all {len(rows)} hooks fit", None


def _dry_run(table: Table, module: str, settings: Settings) -> list[str]:
    """Put each hook on and take it off at once; return the places of those that do not fit."""
    # Its spans are never written: nothing is watched.
    registry = Registry(table, settings, Spans(cast("Any", None), settings.span_threshold))
    misfits = []
    try:
        for row in table.hooks[module]:
            try:
                row.install(registry)()
            except Exception:  # whatever it is, the row is not on
                misfits.append(row.where)
    finally:
        registry.close()
    return misfits


# -- what would load --------------------------------------------------------------------------------


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    # By hand: the call that selects a group differs between versions.
    found = (point for one in importlib.metadata.distributions() for point in one.entry_points)
    return [point for point in dict.fromkeys(found) if point.group == GROUP]


def _disabled(environ: Environ) -> set[str]:
    return {name.strip() for name in environ.get(DISABLED, "").split(",") if name.strip()}


def _loading(environ: Environ) -> Found:
    points, disabled = _entry_points(), _disabled(environ)
    names = {point.name for point in points}
    chosen = _settings(environ).targets
    loading = 0
    for name, library in LIBRARIES.items():
        entry = OURS + name
        if entry not in names:
            yield PROBLEM, f"{entry} is not registered: opentelemetry-instrument does not find it", f"reinstall {DIST}"
        elif {entry, "*"} & disabled:
            yield NOTE, f"{entry} does not load: {DISABLED} says so", None
        elif chosen and name not in chosen:
            yield NOTE, f"{entry} does nothing: {PREFIX}TARGETS does not name it", None
        elif any(_is_there(module) and not _conflict(text) for module, text in library.modules.items()):
            loading += 1
            yield OK, f"{entry} loads", None
    if not loading:
        yield PROBLEM, "none of our instrumentations would load", "see the lines above, and `libraries`"
    yield from _unknown(disabled - names - {"*"}, names, DISABLED)
    for point in points:
        yield from _breaks(point, disabled)


def _breaks(point: importlib.metadata.EntryPoint, disabled: set[str]) -> Found:
    """Any error but that of an import, in any instrumentation, stops all that come after it."""
    if {point.name, "*"} & disabled:
        return
    try:
        point.load()
    except ImportError:
        return
    except Exception as error:
        what = f"the instrumentation {point.name} cannot be loaded ({type(error).__name__}), which stops those after it"
        yield PROBLEM, what, f"{DISABLED}={point.name}, or mend it"


def _unknown(given: Iterable[str], known: Collection[str], variable: str) -> Found:
    """What was given is not told again: it may have been meant for another variable, and be secret."""
    for name in given:
        near = difflib.get_close_matches(name, known, 1)
        yield (
            NOTE if variable == DISABLED else PROBLEM,
            f"{variable} has a name that nothing here has",
            f"did you mean {near[0]}?" if near else None,
        )


# -- what others do ------------------------------------------------------------------------------------

BESIDE = {
    "sqlalchemy": "its spans of statements and ours of waits go together; its metric of connections drifts: ignore it",
    "redis": "its spans of commands and ours of waits go together",
    "httpx": "its spans of requests and ours of waits go together",
    "httpx2": "its spans of requests and ours of waits go together",
    "qdrant": "its spans of calls and what we tell of pools go together",
}


def _overlap(environ: Environ) -> Found:
    disabled, ours = _disabled(environ), {OURS + name for name in LIBRARIES}
    for one in sorted(importlib.metadata.distributions(), key=lambda one: str(one.metadata["Name"])):
        name = one.metadata["Name"]
        for point in one.entry_points:
            if point.group != GROUP or canonicalize_name(name or "") == DIST:
                continue
            if point.name in ours:
                yield PROBLEM, f"{name} has an instrumentation of our name, {point.name}", f"remove {name}"
            elif point.name in BESIDE and not {point.name, "*"} & disabled:
                yield from _beside(point.name, f"{name} {one.version}", one.requires or ())
    if _is_there("redis") and importlib.util.find_spec("redis.observability") is not None:
        how = {"defer": "leave to them what they tell", "replace": "take their place", "both": "come beside them"}
        said = how[_settings(environ).native_redis]
        yield OK, f"redis-py has metrics of its own: if your code switches them on, ours {said}", None


def _beside(entry: str, who: str, requires: Iterable[str]) -> Found:
    refused = [wanted for wanted in _wanted(requires) if _version(wanted.name) and not _met(wanted)]
    if refused:
        have = f"{refused[0].name} {_version(refused[0].name)}"
        yield NOTE, f"{who} refuses {have}: no spans of it; ours is not affected", None
    else:
        yield OK, f"{who} is there too: {BESIDE[entry]}", None


def _wanted(requires: Iterable[str]) -> Iterator[Requirement]:
    """What an instrumentation demands of the libraries it is for."""
    for text in requires:
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            continue
        if wanted.marker is not None and wanted.marker.evaluate({"extra": "instruments"}):
            yield wanted


def _met(wanted: Requirement) -> bool:
    return wanted.specifier.contains(_version(wanted.name) or "0", prereleases=True)


# -- would there be an SDK -------------------------------------------------------------------------------


def _sdk(environ: Environ) -> Found:
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        yield PROBLEM, "OTEL_SDK_DISABLED is true: nothing is exported", "unset it"
    if _version("opentelemetry-sdk") is None:
        yield PROBLEM, "there is no opentelemetry-sdk: no meter provider, nothing is exported", INSTALL
        return
    if configured := _config_file(environ):
        yield from _from_file(*configured)
        return
    if not _has_distro():
        do = f"{INSTALL}, or set the SDK up in code"
        yield NOTE, "there is no distro: opentelemetry-instrument configures no SDK here", do
        return
    yield from _exporters(environ)
    yield from _traces(environ)
    yield from _intervals(environ)


def _config_file(environ: Environ) -> tuple[str, str] | None:
    return next(((key, environ[key]) for key in CONFIG_FILES if environ.get(key)), None)


def _from_file(variable: str, path: str) -> Found:
    if not Path(path).is_file():
        yield PROBLEM, f"{variable} is set, and there is no such file: the app runs uninstrumented", None
    elif _version("opentelemetry-configuration") is None:
        do = "pip install opentelemetry-configuration"
        yield PROBLEM, f"{variable} is set, and opentelemetry-configuration is not installed", do
    else:
        yield OK, f"{variable} configures the SDK; the variables for exporters do not count", None
        yield NOTE, "with it, list the detector of service.instance.id, or the processes cannot be told apart", None


def _has_distro() -> bool:
    groups = {point.group for one in importlib.metadata.distributions() for point in one.entry_points}
    return "opentelemetry_configurator" in groups


def _exporters(environ: Environ) -> Found:
    known = _metrics_exporters()
    chosen = _chosen_exporters(environ)
    for name in chosen:
        if name == "none":
            yield PROBLEM, "OTEL_METRICS_EXPORTER is none: no metric is exported", "unset it, or say otlp"
        elif name is None:
            do = f"say {GRPC} or {HTTP}"
            yield PROBLEM, "OTEL_EXPORTER_OTLP_PROTOCOL is none that the SDK knows: the app runs uninstrumented", do
        elif name in known:
            yield OK, f"metrics go out by {name}", None
        elif name in EXPORTERS.values():
            other = next((protocol for protocol, theirs in EXPORTERS.items() if theirs in known), None)
            do = f"{INSTALL}, or OTEL_EXPORTER_OTLP_PROTOCOL={other}, which is installed" if other else INSTALL
            yield PROBLEM, f"the exporter {name} is not installed: the app runs uninstrumented", do
        else:
            yield from _unknown([name], known, "OTEL_METRICS_EXPORTER")


def _metrics_exporters() -> set[str]:
    points = (point for one in importlib.metadata.distributions() for point in one.entry_points)
    return {point.name for point in points if point.group == "opentelemetry_metrics_exporter"}


def _chosen_exporters(environ: Environ) -> list[str | None]:
    """By the names of their entry points; None for OTLP over a protocol that there is not."""
    chosen = (name.strip() for name in (environ.get("OTEL_METRICS_EXPORTER") or "otlp").split(","))
    return [EXPORTERS.get(_protocol(environ)) if name == "otlp" else name for name in chosen]


def _protocol(environ: Environ) -> str:
    names = ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    return next((environ[name].strip() for name in names if environ.get(name)), GRPC)


def _traces(environ: Environ) -> Found:
    off = environ.get("OTEL_TRACES_EXPORTER") == "none" or environ.get("OTEL_TRACES_SAMPLER", "").endswith("always_off")
    if off:
        yield NOTE, "no spans are exported: who holds connections is then told in the log alone", None


def _intervals(environ: Environ) -> Found:
    text = environ.get("OTEL_METRIC_EXPORT_INTERVAL", "").strip()
    try:
        milliseconds = float(text or MILLISECONDS)
    except ValueError:
        yield PROBLEM, "OTEL_METRIC_EXPORT_INTERVAL is not a number of milliseconds", "10000 is every ten seconds"
        return
    if milliseconds > MILLISECONDS:
        yield NOTE, f"metrics are exported every {milliseconds / 1000:g} s: what hangs is seen as late as that", None
    if environ.get(HISTOGRAMS, "").startswith("base2"):
        yield NOTE, "exponential histograms cost the collection 8 µs a sample instead of 0.13", None


# -- does anybody answer ------------------------------------------------------------------------------------


def _endpoint(environ: Environ) -> Found:
    protocols = {name: protocol for protocol, name in EXPORTERS.items()}
    if _config_file(environ):
        return
    chosen = set() if _version("opentelemetry-sdk") is None else {*_chosen_exporters(environ)} & _metrics_exporters()
    for name in chosen & protocols.keys():
        one = target(environ, protocols[cast("str", name)])
        yield from _answers(one, any(environ.get(key) for key in ENDPOINTS))


def _answers(one: Target, asked_for: bool) -> Found:
    why = ask(one)
    if why is None:
        yield OK, f"{one.shown} takes metrics over {one.protocol}", None
    elif asked_for:
        yield PROBLEM, f"{one.shown} over {one.protocol}: {why}", "see OTEL_EXPORTER_OTLP_ENDPOINT and _PROTOCOL"
    else:
        do = "set OTEL_EXPORTER_OTLP_ENDPOINT, or start a Collector (or `otel-pools watch`) here"
        yield NOTE, f"no endpoint is set, and at the default, {one.shown} over {one.protocol}: {why}", do
    clear = one.insecure if one.protocol == GRPC else one.parts.scheme == "http"
    if clear and one.headers and one.parts.hostname not in LOOPBACK:
        yield NOTE, f"headers go to {one.shown} in clear; they may hold credentials", "use https://"


# -- what was said to us -------------------------------------------------------------------------------------


def _settings(environ: Environ) -> Settings:
    """Those that are right; the others are at their defaults, as in an app."""
    return Settings(**{name: value for name, value in _read(environ) if value is not None})


def _read(environ: Environ) -> Iterator[tuple[str, Any]]:
    """Each setting that was given, and its value; None if it is wrong."""
    for field in fields(Settings):
        if text := environ.get(PREFIX + field.name.upper(), "").strip():
            try:
                yield field.name, _READ[field.name][0](text)
            except (KeyError, TypeError, ValueError):
                yield field.name, None


def _given(environ: Environ) -> Found:
    known = {PREFIX + field.name.upper() for field in fields(Settings)}
    for variable in sorted(environ):
        if variable.startswith(PREFIX) and variable not in known and not variable.startswith(f"{PREFIX}DEMO_"):
            near = difflib.get_close_matches(variable, known, 1)
            do = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            yield PROBLEM, f"there is no setting {variable}: it does nothing", do
    for name, value in _read(environ):
        variable = PREFIX + name.upper()
        if value is None:
            yield PROBLEM, f"{variable} is wrong and not used", f"it must be {_READ[name][1]}"
        else:
            yield OK, f"{variable} is used", None
    chosen = _settings(environ)
    yield from _unknown(set(chosen.targets) - LIBRARIES.keys(), LIBRARIES, f"{PREFIX}TARGETS")
    metrics = {metric.name for metric in words.METRICS}
    yield from _unknown(set(chosen.metrics_exclude) - metrics, metrics, f"{PREFIX}METRICS_EXCLUDE")


# -- of processes ------------------------------------------------------------------------------------------------


def _processes(environ: Environ) -> Found:
    attributes = environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    if not environ.get("OTEL_SERVICE_NAME") and "service.name=" not in attributes and not _config_file(environ):
        yield NOTE, "the service has no name, and will be unknown_service", "set OTEL_SERVICE_NAME"
    forks = [name for name in PREFORK if _version(name)]
    if not forks:
        return
    if "service.instance.id=" in attributes:
        what = f"with {forks[0]}, all workers have the one service.instance.id of OTEL_RESOURCE_ATTRIBUTES"
        yield NOTE, f"{what}, and cannot be told apart", "leave it out (SDK 1.45 and later give each its own)"
    elif not _since(_version("opentelemetry-sdk"), INSTANCE_SINCE):
        what = f"with {forks[0]}, the workers of a service cannot be told apart"
        yield NOTE, what, "opentelemetry-sdk 1.45 or later gives each a service.instance.id"
    do = "dispose(close=False) SQLAlchemy engines in each worker, and open other clients there"
    yield NOTE, f"{forks[0]} forks: connections that are open before go to all workers, and break", do
    if {"gunicorn", "celery"} & {*forks}:
        do = "begin in the child there (opentelemetry.instrumentation.auto_instrumentation.initialize)"
        yield NOTE, "with --preload, and in Celery, a child forked during an export exports nothing", do
    if "uwsgi" in forks:
        yield NOTE, "uWSGI runs no thread of Python without --enable-threads, and so exports nothing", None


def _since(have: str | None, first: str) -> bool:
    try:
        return have is not None and Version(have) >= Version(first)
    except InvalidVersion:
        return True


CHECKS: dict[str, Callable[[Environ], Found]] = {
    "versions": _versions,
    "libraries": _libraries,
    "hooks": _hooks,
    "loading": _loading,
    "overlap": _overlap,
    "sdk": _sdk,
    "endpoint": _endpoint,
    "settings": _given,
    "processes": _processes,
}
