use std::rc::Rc;
use std::sync::Arc;

use async_trait::async_trait;
use eventbus::{Admin, Capabilities, Consumer, InFile, Publisher, Result, Subscription, Transport};

#[derive(Debug)]
struct Local(Rc<u8>);

#[async_trait]
impl Transport for Local {
    fn capabilities(&self) -> Capabilities {
        Capabilities::NONE
    }
    async fn publisher(&self) -> Result<Arc<dyn Publisher>> {
        unimplemented!()
    }
    async fn subscribe(&self, _: &Subscription) -> Result<Arc<dyn Consumer>> {
        unimplemented!()
    }
    fn admin(&self) -> Option<&dyn Admin> {
        None
    }
    fn in_file(&self) -> Option<&dyn InFile> {
        None
    }
    async fn close(&self) -> Result<()> {
        Ok(())
    }
}

fn main() {}
