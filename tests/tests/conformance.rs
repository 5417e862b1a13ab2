//! Every transport of this workspace against the one list of cases.

use eventbus_tests::subjects::{self, Strength};

eventbus::conformance!(memory, subjects::memory(Strength::Default));
eventbus::conformance!(memory_strong, subjects::memory(Strength::Strong));
eventbus::conformance!(memory_total, subjects::memory(Strength::Total));
eventbus::conformance!(sqlite, subjects::sqlite(16));
