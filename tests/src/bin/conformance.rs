//! Runs the suite on the transport an address names, and prints its capability page.

use std::process::ExitCode;
use std::sync::Arc;

use eventbus::conformance::{Subject, run_all};
use eventbus::{Bus, Transport};

#[tokio::main]
async fn main() -> ExitCode {
    let Some(url) = std::env::args().nth(1) else {
        eprintln!("usage: cargo xtask conformance URL, such as sqlite:///tmp/bus.db or memory://name");
        return ExitCode::from(2);
    };
    match run(url).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(url: String) -> eventbus::Result<bool> {
    // Held to the end: an in-process broker lives as long as a value that uses it.
    let bus: Bus = eventbus::connect(&url).await?;
    println!("| capability | claim |\n|---|---|");
    for (axis, claim) in bus.transport().capabilities().rows() {
        println!("| {axis} | {claim} |");
    }
    println!();
    let subject = Subject::new("transport", move || {
        let url = url.clone();
        async move { Ok(Arc::clone(eventbus::connect(&url).await?.transport()) as Arc<dyn Transport>) }
    });
    let report = run_all(&subject).await;
    println!("{report}");
    Ok(report.counts().1 == 0)
}
