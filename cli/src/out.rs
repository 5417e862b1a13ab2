//! Output: results on standard output in one of a few forms, everything else on standard error.

use std::io::{IsTerminal, Write};

use clap::ValueEnum;
use serde_json::{Map, Value};

use crate::exit::{Failure, Outcome};

/// The form of results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// A table on a terminal, jsonl when piped.
    Auto,
    /// For people.
    Human,
    /// A table.
    Table,
    /// One JSON document.
    Json,
    /// One JSON object a line.
    Jsonl,
    /// One YAML document.
    Yaml,
    /// Comma-separated values with a header line.
    Csv,
    /// Nothing.
    None,
}

impl Format {
    fn resolved(self) -> Self {
        match self {
            Self::Auto if std::io::stdout().is_terminal() => Self::Table,
            Self::Auto => Self::Jsonl,
            Self::Human => Self::Table,
            other => other,
        }
    }

    /// Whether records are shown as text for people.
    pub(crate) fn is_for_people(self) -> bool {
        self.resolved() == Self::Table
    }
}

/// When something is set off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Color {
    /// On a terminal.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

impl Color {
    /// The convention of no-color.org: any value but an empty one switches it off, unless it is asked for.
    fn is_wanted(self) -> bool {
        let is_set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        match self {
            Self::Always => true,
            Self::Never => false,
            Self::Auto => std::io::stdout().is_terminal() && !is_set("NO_COLOR") && !is_dumb,
        }
    }
}

/// Where results go; every write can fail, so that a closed pipe ends quietly.
#[derive(Debug)]
pub(crate) struct Out {
    format: Format,
    columns: Option<Vec<String>>,
    /// Whether the line of names is still to be written.
    heads: bool,
    bold: bool,
    n_records: u64,
    lock: std::io::StdoutLock<'static>,
}

impl Out {
    /// Opens standard output.
    pub(crate) fn new(format: Format, columns: Option<Vec<String>>, heads: bool, color: Color) -> Self {
        Self { format, columns, heads, bold: color.is_wanted(), n_records: 0, lock: std::io::stdout().lock() }
    }

    /// The form asked for.
    pub(crate) fn format(&self) -> Format {
        self.format
    }

    /// Writes a line.
    ///
    /// # Errors
    /// The reader has gone.
    pub(crate) fn line(&mut self, text: impl std::fmt::Display) -> Outcome {
        writeln!(self.lock, "{text}")?;
        Ok(self.lock.flush()?)
    }

    /// Writes one record in the form asked for.
    ///
    /// # Errors
    /// The reader has gone.
    pub(crate) fn record(&mut self, record: Value) -> Outcome {
        self.n_records += 1;
        match (self.format.resolved(), record) {
            (Format::None, _) => Ok(()),
            // One document: the list is closed by `end`.
            (Format::Json, record) => {
                let before = if self.n_records == 1 { '[' } else { ',' };
                self.line(format_args!("{before}{record}"))
            }
            (Format::Yaml, Value::Object(fields)) => {
                self.line("---")?;
                fields.iter().try_for_each(|(name, value)| self.line(format_args!("{name}: {value}")))
            }
            (Format::Csv, Value::Object(fields)) => {
                if std::mem::take(&mut self.heads) {
                    self.line(fields.keys().map(|name| quoted(name)).collect::<Vec<_>>().join(","))?;
                }
                self.line(fields.values().map(|value| quoted(&cell(value))).collect::<Vec<_>>().join(","))
            }
            (_, record) => self.line(record),
        }
    }

    /// Writes one record alone: for people spread over lines.
    ///
    /// # Errors
    /// The reader has gone.
    pub(crate) fn document(&mut self, record: &Value) -> Outcome {
        match self.format.resolved() {
            Format::Table => {
                let text = serde_json::to_string_pretty(record);
                self.line(text.map_err(|error| crate::exit::Failure::Runtime(error.to_string()))?)
            }
            Format::Json | Format::Jsonl => self.line(record),
            _ => self.record(record.clone()),
        }
    }

    /// Ends a list of records.
    ///
    /// # Errors
    /// The reader has gone.
    pub(crate) fn end(&mut self) -> Outcome {
        match (self.format.resolved(), self.n_records) {
            (Format::Json, 0) => self.line("[]"),
            (Format::Json, _) => self.line("]"),
            _ => Ok(()),
        }
    }

    /// Writes rows of equal columns.
    ///
    /// # Errors
    /// The reader has gone. Usage: a column that is asked for does not exist.
    pub(crate) fn rows(&mut self, rows: Vec<Map<String, Value>>) -> Outcome {
        if let (Some(columns), Some(first)) = (&self.columns, rows.first())
            && let Some(unknown) = columns.iter().find(|name| !rows.iter().any(|row| row.contains_key(*name)))
        {
            let known: Vec<_> = first.keys().map(String::as_str).collect();
            return Err(Failure::Usage(format!("there is no column {unknown}; known: {}", known.join(", "))));
        }
        let keep = |row: Map<String, Value>| match &self.columns {
            None => row,
            Some(columns) => {
                columns.iter().filter_map(|name| Some((name.clone(), row.get(name)?.clone()))).collect()
            }
        };
        let rows: Vec<Map<String, Value>> = rows.into_iter().map(keep).collect();
        match self.format.resolved() {
            Format::None => Ok(()),
            Format::Json => self.line(Value::Array(rows.into_iter().map(Value::Object).collect())),
            Format::Yaml => rows.into_iter().try_for_each(|row| {
                row.iter().enumerate().try_for_each(|(at, (name, value))| {
                    // JSON's scalars and flow collections are YAML as they are (YAML 1.2.2, 1.3).
                    self.line(format_args!("{} {name}: {value}", if at == 0 { "-" } else { " " }))
                })
            }),
            Format::Jsonl => rows.into_iter().try_for_each(|row| self.line(Value::Object(row))),
            Format::Csv => {
                let Some(first) = rows.first() else { return Ok(()) };
                if self.heads {
                    self.line(first.keys().map(|name| quoted(name)).collect::<Vec<_>>().join(","))?;
                }
                rows.iter().try_for_each(|row| {
                    self.line(row.values().map(|value| quoted(&cell(value))).collect::<Vec<_>>().join(","))
                })
            }
            _ => {
                let Some(first) = rows.first() else { return Ok(()) };
                let mut table = comfy_table::Table::new();
                table.load_preset(comfy_table::presets::NOTHING);
                if self.heads {
                    table.set_header(first.keys().map(|name| name.to_uppercase()));
                }
                for row in &rows {
                    table.add_row(row.values().map(|value| {
                        let right = value.is_number();
                        let alignment = if right {
                            comfy_table::CellAlignment::Right
                        } else {
                            comfy_table::CellAlignment::Left
                        };
                        comfy_table::Cell::new(cell(value)).set_alignment(alignment)
                    }));
                }
                let bold = self.bold && self.heads;
                table.lines().enumerate().try_for_each(|(at, line)| match line.trim_end() {
                    names if bold && at == 0 => self.line(format_args!("\x1b[1m{names}\x1b[0m")),
                    line => self.line(line),
                })
            }
        }
    }
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}

/// Builds a row.
macro_rules! row {
    ($($name:literal: $value:expr),* $(,)?) => {{
        let mut row = serde_json::Map::new();
        $(row.insert($name.to_owned(), serde_json::json!($value));)*
        row
    }};
}

pub(crate) use row;

/// Says something on standard error; nobody listening is no failure.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        drop(writeln!(std::io::stderr(), $($text)*));
    }};
}

pub(crate) use say;
