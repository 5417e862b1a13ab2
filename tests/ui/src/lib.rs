//! Wrong programs, in `tests/ui`: what they are built with.
