//! A bus into which transactions publish by themselves.

use std::fmt;
use std::sync::Arc;

use eventbus::{InFile, Text, Transport};

/// The bus, and under which name events are numbered.
#[doc(hidden)]
pub struct Direct {
    pub(crate) transport: Arc<dyn Transport>,
    #[cfg_attr(
        not(feature = "sqlite"),
        expect(dead_code, reason = "only SQLite has transactions that publish by themselves")
    )]
    pub(crate) identity: Text,
}

impl Direct {
    pub(crate) fn bus(&self) -> Option<&dyn InFile> {
        self.transport.in_file()
    }
}

impl fmt::Debug for Direct {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Direct").field("transport", &self.transport).finish_non_exhaustive()
    }
}
