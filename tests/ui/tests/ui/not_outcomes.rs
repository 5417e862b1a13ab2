//! A batch handler that returns something else than outcomes.

use eventbus::{Batch, Event, Service, Topic};
use serde::{Deserialize, Serialize};

#[derive(Event, Serialize, Deserialize)]
#[event(type = "t", version = 1)]
struct Placed {}

async fn index(orders: Batch<Placed>) -> Vec<bool> {
    orders.iter().map(|_| true).collect()
}

fn main() {
    let _ = Service::<()>::new("s").on_batch(Topic::new("t").unwrap(), index);
}
