//! One seed: what runs, what happens to it, and how it ends.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use eventbus::Result;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep};

use crate::account::{self, Report};
use crate::bug::Bug;
use crate::clock;
use crate::roles::{self, LEASE};
use crate::world::{Far, Node, World};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Write,
    Relay,
    Serve,
}

impl Role {
    const ALL: [Self; 3] = [Self::Write, Self::Relay, Self::Serve];
}

/// At most so many processes of a role.
const MOST: usize = 3;
/// Everything is done within so long after the last fault, though keys wait for minutes.
const PATIENCE: Duration = Duration::from_secs(30 * 60);

struct Run {
    world: Arc<World>,
    processes: Vec<(Role, Arc<Node>)>,
    last_id: u64,
    problems: Arc<Mutex<Vec<String>>>,
}

/// Runs a seed for so long, and draws up the account.
pub(crate) async fn run(seed: u64, length: Duration, bug: Bug) -> Report {
    clock::begin();
    let world = Arc::new(World::new(seed, bug));
    let mut run = Run { world: world.clone(), processes: Vec::new(), last_id: 0, problems: Arc::default() };
    for role in Role::ALL {
        (0..=world.draw(2)).for_each(|_| run.start(role));
    }
    let end = Instant::now() + length;
    while Instant::now() < end {
        sleep(Duration::from_secs(2 + world.draw(25))).await;
        world.n_faults.fetch_add(1, Relaxed);
        run.disturb();
    }
    let is_done = run.calm_down().await;
    let mut report = account::draw_up(&world, is_done).await;
    for problem in run.problems.lock().drain(..) {
        report.violated("end", problem);
    }
    report
}

impl Run {
    fn start(&mut self, role: Role) {
        self.last_id += 1;
        let (node, problems) = (Node::new(&self.world, self.last_id), self.problems.clone());
        self.processes.push((role, node.clone()));
        tokio::spawn(async move {
            let ended: Result<()> = match role {
                Role::Write => roles::write(node.clone()).await,
                Role::Relay => roles::relay(node.clone()).await,
                Role::Serve => roles::serve(node.clone()).await,
            };
            node.kill();
            // What is still in hand when the time to drain is over is handled again.
            if let Err(error) = ended
                && !error.is_retryable()
            {
                problems.lock().push(format!("{role:?} {}: {error}", node.id));
            }
        });
    }

    fn count(&self, role: Role) -> usize {
        self.processes.iter().filter(|(of, _)| *of == role).count()
    }

    /// One accident, or one thing that operators do.
    fn disturb(&mut self) {
        let world = self.world.clone();
        let at = usize::try_from(world.draw(self.processes.len() as u64)).unwrap_or_default();
        let within = |from: u64, to: u64| Duration::from_millis(from + world.draw(to - from));
        let what = world.draw(12);
        world.note("disturb", what);
        match what {
            0..3 => {
                let (role, node) = self.processes.swap_remove(at);
                node.kill();
                self.start(role);
            }
            3 => {
                let (role, node) = self.processes.swap_remove(at);
                node.ask_to_end();
                self.start(role);
            }
            4 | 5 => {
                if let Some((_, node)) = self.processes.get(at) {
                    let most = u64::try_from(LEASE.as_millis()).unwrap_or_default() * 3;
                    node.stop(within(200, most));
                }
            }
            6 => {
                world.away(Far::Database, within(500, 40_000));
                world.ledger.abort_all(|_| true, true);
            }
            7 => world.away(Far::Broker, within(500, 40_000)),
            8 => {
                let meant = world.draw(self.last_id + 1);
                world.ledger.abort_all(|node| node == meant, true);
            }
            9 => clock::jump(i64::try_from(world.draw(7_200_000)).unwrap_or_default() - 3_600_000),
            10 => {
                let role = Role::ALL[usize::try_from(world.draw(3)).unwrap_or_default()];
                if self.count(role) < MOST {
                    self.start(role);
                }
            }
            _ => {
                let role = self.processes.get(at).map(|(role, _)| *role);
                if role.is_some_and(|role| self.count(role) > 1) {
                    self.processes.swap_remove(at).1.ask_to_end();
                }
            }
        }
    }

    /// Ends all faults and the writers; returns whether everything came to its end then.
    async fn calm_down(&mut self) -> bool {
        self.world.calm();
        for (role, node) in &self.processes {
            node.resume();
            if *role == Role::Write {
                node.ask_to_end();
            }
        }
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            // What came late to the database may open and end something still.
            sleep(Duration::from_secs(60)).await;
            let (n_open, n_committed, n_effects) = self.world.ledger.counts();
            if n_open == 0 && n_effects >= n_committed {
                return true;
            }
        }
        false
    }
}
