use eventbus::{Service, Topic};

async fn handle(order: u64) {}

fn main() {
    let _ = Service::<()>::new("orders").on(Topic::new("orders").unwrap(), handle);
}
