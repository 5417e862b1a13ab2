//! How far long work has come, on standard error: a bar for people, lines for others, or nothing.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use crate::out::say;

/// How often a line is written where there is no bar.
const EVERY: Duration = Duration::from_secs(5);

/// The form of progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Style {
    /// A bar on a terminal, lines elsewhere.
    Auto,
    /// Lines.
    Plain,
    /// JSON lines: {"verb","done","total"}.
    Json,
    /// Nothing.
    None,
}

/// The progress of one command.
#[derive(Debug)]
pub(crate) struct Progress {
    style: Style,
    verb: &'static str,
    total: u64,
    bar: Option<ProgressBar>,
    told: Instant,
}

impl Progress {
    /// Begins; nothing is shown of what is over at once.
    pub(crate) fn begin(style: Style, verb: &'static str, total: u64) -> Self {
        let bar = (style == Style::Auto && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(10));
            let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {eta}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_prefix(verb);
            bar
        });
        Self { style, verb, total, bar, told: Instant::now() }
    }

    /// So much is done.
    pub(crate) fn at(&mut self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        } else if self.told.elapsed() >= EVERY {
            self.told = Instant::now();
            self.line(done);
        }
    }

    /// It is over.
    pub(crate) fn end(self, done: u64) {
        match &self.bar {
            Some(bar) => bar.finish_and_clear(),
            None if self.style == Style::Json => self.line(done),
            None => {}
        }
    }

    fn line(&self, done: u64) {
        let Self { verb, total, .. } = self;
        match self.style {
            Style::None => {}
            Style::Json => say!("{}", json!({"verb": verb, "done": done, "total": total})),
            Style::Auto | Style::Plain => say!("{verb}: {done} of {total}"),
        }
    }
}
