// What a dashboard of ours must be, in the words of @grafana/schema; tests/test_dashboards.py holds each file against it.
import type { Dashboard, Panel, RowPanel } from '@grafana/schema';
import type { Options as StatOptions } from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type {
  FieldConfig as TableFields,
  Options as TableOptions,
} from '@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen';
import type {
  FieldConfig as Lines,
  Options as LineOptions,
} from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';

// JSON has words where the schema has members of enumerations.
type Plain<T> = T extends string
  ? `${T}`
  : T extends number | boolean | null | undefined
    ? T
    : T extends (infer U)[]
      ? Plain<U>[]
      : T extends object
        ? { [K in keyof T]: Plain<T[K]> }
        : T;

interface Query {
  refId: 'A' | 'B' | 'C' | 'D' | 'E' | 'F' | 'G' | 'H';
  expr: string;
  datasource: { type: 'prometheus'; uid: string };
  legendFormat?: string;
  exemplar: boolean;
  range?: boolean;
  instant?: boolean;
  format?: 'table';
}

type Typed<P extends string, O, F> = Omit<Plain<Panel>, 'type' | 'options' | 'fieldConfig' | 'targets'> & {
  type: P;
  title: string;
  description: string;
  options: Plain<O>;
  fieldConfig: Omit<NonNullable<Plain<Panel>['fieldConfig']>, 'defaults'> & {
    defaults: Omit<NonNullable<Plain<Panel>['fieldConfig']>['defaults'], 'custom'> & { custom?: Plain<Partial<F>> };
  };
  targets: Query[];
};

export type Row = Omit<Plain<RowPanel>, 'panels'> & { panels: [] };
export type Chart =
  | Typed<'timeseries', LineOptions, Lines>
  | Typed<'stat', Partial<StatOptions>, Record<string, never>>
  | Typed<'table', Partial<TableOptions>, TableFields>;
export type Board = Omit<Plain<Dashboard>, 'panels'> & { panels: (Row | Chart)[] };
