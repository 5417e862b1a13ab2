//! What lists have in common: which rows, in which order, how often.

use std::cmp::Ordering;
use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;
use regex_lite::Regex;
use serde_json::{Map, Value};

use crate::exit::{Failure, Outcome};
use crate::out::Out;
use crate::range;

type Row = Map<String, Value>;

/// Flags of lists.
#[derive(Debug, Clone, Args)]
pub(crate) struct Listing {
    /// Only names like this: * stands for anything, ? for one character.
    #[arg(long = "match", value_name = "GLOB")]
    glob: Option<String>,
    /// Only names that hold this regular expression.
    #[arg(long, value_name = "RE")]
    regex: Option<String>,
    /// Sorted by a column: numbers from the largest, texts from the first.
    #[arg(long, value_name = "COLUMN")]
    sort: Option<String>,
    /// Only what is behind by more.
    #[arg(long, value_name = "N")]
    lag_gt: Option<u64>,
    /// Only what holds no events.
    #[arg(long)]
    empty: bool,
    /// Again and again, every 2 s or as often as given, until Ctrl-C.
    #[arg(short, long, value_name = "EVERY", num_args = 0..=1, require_equals = true, default_missing_value = "2s", value_parser = range::duration)]
    watch: Option<Duration>,
}

impl Listing {
    /// Whether it does not end by itself.
    pub(crate) fn follows(&self) -> bool {
        self.watch.is_some()
    }

    /// Writes a list, once or again and again.
    ///
    /// # Errors
    /// What reading reports; usage: a pattern or a column that is none.
    pub(crate) async fn show(
        &self,
        out: &mut Out,
        name: &str,
        rows: impl AsyncFn() -> Outcome<Vec<Row>>,
    ) -> Outcome {
        let pattern = self.pattern()?;
        loop {
            let mut rows = rows().await?;
            let text = |row: &Row| row.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
            let number = |row: &Row, column: &str| row.get(column).and_then(Value::as_u64).unwrap_or(0);
            if let Some(column) =
                self.sort.as_ref().filter(|column| rows.iter().any(|row| !row.contains_key(*column)))
            {
                return Err(Failure::Usage(format!("there is no column {column} to sort by")));
            }
            rows.retain(|row| {
                pattern.as_ref().is_none_or(|pattern| pattern.is_match(&text(row)))
                    && self.lag_gt.is_none_or(|bound| number(row, "lag") > bound)
                    && (!self.empty || number(row, "kept") == 0)
            });
            if let Some(column) = &self.sort {
                rows.sort_by(|one, other| order(&one[column], &other[column]));
            }
            if self.watch.is_some() && std::io::stdout().is_terminal() {
                // The screen is cleared, and the place is the first.
                out.line("\x1b[2J\x1b[H")?;
            }
            out.rows(rows)?;
            match self.watch {
                None => return Ok(()),
                Some(every) => tokio::time::sleep(every).await,
            }
        }
    }

    fn pattern(&self) -> Outcome<Option<Regex>> {
        match (&self.glob, &self.regex) {
            (Some(_), Some(_)) => Err(Failure::Usage("--match and --regex exclude each other".into())),
            (Some(glob), None) => {
                let escaped = regex_lite::escape(glob).replace(r"\*", ".*").replace(r"\?", ".");
                regex(&format!("^{escaped}$")).map(Some)
            }
            (None, Some(text)) => regex(text).map(Some),
            (None, None) => Ok(None),
        }
    }
}

/// Reads a regular expression.
///
/// # Errors
/// Usage: it is none.
pub(crate) fn regex(text: &str) -> Outcome<Regex> {
    Regex::new(text).map_err(|error| Failure::Usage(format!("not a regular expression: {text}: {error}")))
}

fn order(one: &Value, other: &Value) -> Ordering {
    match (one.as_f64(), other.as_f64()) {
        (Some(one), Some(other)) => other.total_cmp(&one),
        _ => one.to_string().cmp(&other.to_string()),
    }
}
