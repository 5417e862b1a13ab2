use eventbus::{Meta, Service, Topic};

async fn handle(Meta(_): Meta) -> u64 {
    7
}

fn main() {
    let _ = Service::<()>::new("orders").on(Topic::new("orders").unwrap(), handle);
}
