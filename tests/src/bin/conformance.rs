//! Runs the suite on the transport an address names, and prints its capability page.

use std::process::ExitCode;

use eventbus::conformance::run_each;
use eventbus_tests::subjects::of_url;

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
    // The program that plays a role in another process is built beside this one.
    let child = std::env::current_exe().map(|me| me.with_file_name("child")).unwrap_or_default();
    let subject = of_url(&url, &child)?;
    println!("| capability | claim |\n|---|---|");
    for (axis, claim) in subject.capabilities().await?.rows() {
        println!("| {axis} | {claim} |");
    }
    println!();
    // As in the tests, no case sees what another one left.
    let report = run_each(subject.name(), || of_url(&url, &child)).await?;
    println!("{report}");
    Ok(report.counts().1 == 0)
}
