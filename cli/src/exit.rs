//! Exit codes: what a script learns.

use std::fmt;
use std::process::ExitCode;

use eventbus::{Error, ErrorKind};

/// Why a command ended without success.
#[derive(Debug)]
pub(crate) enum Failure {
    /// 1: something went wrong while running.
    Runtime(String),
    /// 2: the command line or the configuration is wrong.
    Usage(String),
    /// 3: part of the work was done.
    Partial(String),
    /// 4: the named thing does not exist.
    NotFound(String),
    /// 5: refused for safety, or a confirmation is missing.
    Refused(String),
    /// 6: the transport cannot be reached or does not let us in.
    Connect(String),
    /// 7: a check was false.
    Check(String),
    /// 8: it took too long.
    Timeout(String),
    /// 1 or 2: what a monitor's plugin answers; everything was said.
    Plugin(u8),
    /// 130: interrupted.
    Interrupted,
    /// 0: everything was checked, and nothing written.
    DryRun,
    /// 0: the reader of our output has gone.
    ClosedPipe,
}

/// The outcome of a command.
pub(crate) type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// The exit code.
    pub(crate) fn code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::ClosedPipe | Self::DryRun => 0,
            Self::Runtime(_) => 1,
            Self::Usage(_) => 2,
            Self::Partial(_) => 3,
            Self::NotFound(_) => 4,
            Self::Refused(_) => 5,
            Self::Connect(_) => 6,
            Self::Check(_) => 7,
            Self::Timeout(_) => 8,
            Self::Plugin(code) => *code,
            Self::Interrupted => 130,
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Runtime(text)
            | Self::Usage(text)
            | Self::Partial(text)
            | Self::NotFound(text)
            | Self::Refused(text)
            | Self::Connect(text)
            | Self::Check(text)
            | Self::Timeout(text) => f.write_str(text),
            Self::Interrupted => f.write_str("interrupted"),
            Self::DryRun => f.write_str("dry run: nothing was written"),
            Self::ClosedPipe | Self::Plugin(_) => Ok(()),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        match error.kind() {
            ErrorKind::Config | ErrorKind::Invalid | ErrorKind::Unsupported => Self::Usage(text),
            ErrorKind::NotFound => Self::NotFound(text),
            ErrorKind::Unauthorized => Self::Connect(text),
            ErrorKind::Timeout => Self::Timeout(text),
            _ => Self::Runtime(text),
        }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::BrokenPipe => Self::ClosedPipe,
            _ => Self::Runtime(error.to_string()),
        }
    }
}
