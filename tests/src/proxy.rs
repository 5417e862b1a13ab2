//! A wire that can fail: a TCP proxy on this machine with faults to switch.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicUsize, Ordering as Atomic};
use std::time::Duration;

use parking_lot::Mutex;

/// What happens to bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Wire {
    /// They pass.
    Whole,
    /// What the server says is lost; what it is told arrives.
    DropAnswers,
    /// Nothing passes and nothing is closed.
    Stall,
    /// Connections are closed, new ones at once.
    Cut,
}

/// Forwards a port of its own to another until it is dropped.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    wire: AtomicU8,
    target: AtomicU16,
    connections: Mutex<Vec<TcpStream>>,
    n_accepted: AtomicUsize,
    /// Set when the proxy goes.
    over: std::sync::atomic::AtomicBool,
}

/// How often a waiting thread looks whether the wire changed.
const LOOK: Duration = Duration::from_millis(20);

impl State {
    fn is(&self, wire: Wire) -> bool {
        self.wire.load(Atomic::SeqCst) == wire as u8
    }

    fn close_all(&self) {
        self.connections.lock().drain(..).for_each(|connection| drop(connection.shutdown(Shutdown::Both)));
    }
}

impl Proxy {
    /// Starts one that leads nowhere until [`lead`](Self::lead) says where.
    ///
    /// # Errors
    /// What the system says.
    pub fn start() -> std::io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let port = listener.local_addr()?.port();
        let state = Arc::new(State {
            wire: AtomicU8::new(Wire::Whole as u8),
            target: AtomicU16::new(0),
            connections: Mutex::default(),
            n_accepted: AtomicUsize::new(0),
            over: false.into(),
        });
        let accepting = state.clone();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if accepting.over.load(Atomic::SeqCst) {
                    return;
                }
                accepting.n_accepted.fetch_add(1, Atomic::Relaxed);
                if let Ok(client) = client {
                    // A connection that fails is the subject of tests, not their failure.
                    drop(forward(&accepting, client));
                }
            }
        });
        Ok(Self { port, state })
    }

    /// Leads new connections to a port of this machine.
    pub fn lead(&self, target: u16) {
        self.state.target.store(target, Atomic::SeqCst);
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Changes what happens to bytes from now on.
    pub fn set(&self, wire: Wire) {
        self.state.wire.store(wire as u8, Atomic::SeqCst);
        if wire == Wire::Cut {
            self.state.close_all();
        }
    }

    /// How many connections were made to it so far, also those that were closed at once.
    pub fn n_accepted(&self) -> usize {
        self.state.n_accepted.load(Atomic::Relaxed)
    }

    /// Closes what is open; new connections fare as the wire says.
    pub fn reset(&self) {
        self.state.close_all();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.over.store(true, Atomic::SeqCst);
        self.state.close_all();
        // Wakes the thread that accepts.
        drop(TcpStream::connect(("127.0.0.1", self.port)));
    }
}

fn forward(state: &Arc<State>, client: TcpStream) -> std::io::Result<()> {
    if state.is(Wire::Cut) {
        return client.shutdown(Shutdown::Both);
    }
    let server = TcpStream::connect(("127.0.0.1", state.target.load(Atomic::SeqCst)))?;
    for connection in [&client, &server] {
        connection.set_nodelay(true)?;
        connection.set_read_timeout(Some(LOOK))?;
        state.connections.lock().push(connection.try_clone()?);
    }
    let (to_server, to_client) = ((client.try_clone()?, server.try_clone()?), (server, client));
    for ((from, to), is_answer) in [(to_server, false), (to_client, true)] {
        let state = state.clone();
        std::thread::spawn(move || copy(&state, from, to, is_answer));
    }
    Ok(())
}

fn copy(state: &State, mut from: TcpStream, mut to: TcpStream, is_answer: bool) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        while state.is(Wire::Stall) {
            std::thread::sleep(LOOK);
        }
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => {
                let lost = is_answer && state.is(Wire::DropAnswers);
                if !lost && to.write_all(buffer.get(..n).unwrap_or_default()).is_err() {
                    break;
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
    }
    drop(from.shutdown(Shutdown::Both));
    drop(to.shutdown(Shutdown::Both));
}
