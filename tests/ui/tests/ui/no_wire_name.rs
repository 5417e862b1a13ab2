use serde::{Deserialize, Serialize};

#[derive(eventbus::Event, Serialize, Deserialize)]
#[event(version = 1)]
struct Placed {
    order: u64,
}

fn main() {}
