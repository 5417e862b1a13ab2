//! What a transport's author gives the suite: how to connect, and what it may do to the store.

use std::fmt;
use std::future::Future;
use std::num::NonZeroUsize;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use super::cases::Hook;
use crate::capability::Capabilities;
use crate::error::Result;
use crate::name::Topic;
use crate::transport::{Transport, Undecodable};

type Future_<T> = Pin<Box<dyn Future<Output = T> + Send>>;
type Connect = Arc<dyn Fn() -> Future_<Result<Arc<dyn Transport>>> + Send + Sync>;
type Raw = Arc<dyn Fn(Topic, Undecodable) -> Future_<Result<()>> + Send + Sync>;
type Switch = Arc<dyn Fn(bool) -> Future_<Result<()>> + Send + Sync>;
type PowerCut = Arc<dyn Fn(u64) -> Future_<Result<Arc<dyn Transport>>> + Send + Sync>;
type Damage = Arc<dyn Fn(u64) -> Future_<Result<()>> + Send + Sync>;
type Child = Arc<dyn Fn(&[&str]) -> std::process::Command + Send + Sync>;
type Clock = Arc<dyn Fn(bool, Duration) -> Future_<Result<()>> + Send + Sync>;
type Restart = Arc<dyn Fn() -> Future_<Result<()>> + Send + Sync>;

/// How much a run does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// For every commit.
    Short,
    /// For the nightly run.
    Full,
}

/// Times and sizes of a run.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Settings {
    /// How much is done.
    pub size: Size,
    /// Longest wait for something that must happen.
    pub idle: Duration,
    /// How long nothing may arrive where nothing must.
    pub quiet: Duration,
    /// Lease asked for where a case waits for its end.
    pub lease: Duration,
    /// Where random choices come from.
    pub seed: u64,
}

impl Default for Settings {
    /// `CONFORMANCE_SEED` and `CONFORMANCE_SIZE=full` change a run.
    fn default() -> Self {
        let var = |name| std::env::var(name).ok();
        Self {
            size: if var("CONFORMANCE_SIZE").as_deref() == Some("full") { Size::Full } else { Size::Short },
            idle: Duration::from_secs(15),
            quiet: Duration::from_millis(300),
            lease: Duration::from_millis(400),
            seed: var("CONFORMANCE_SEED")
                .and_then(|seed| seed.parse().ok())
                .unwrap_or_else(|| fastrand::u64(..)),
        }
    }
}

/// A transport under test.
#[derive(Clone)]
pub struct Subject {
    name: &'static str,
    connect: Connect,
    raw: Option<Raw>,
    bound: Option<NonZeroUsize>,
    cut: Option<Switch>,
    fill: Option<Switch>,
    restart: Option<Restart>,
    child: Option<Child>,
    power: Option<Power>,
    clock: Option<Clock>,
    settings: Settings,
}

/// What a disk can do to a store, for [`Hook::Power`].
#[derive(Clone)]
pub struct Power {
    cut: PowerCut,
    fail_syncs: Switch,
    damage: Damage,
}

impl Power {
    /// `cut` opens the store as it could be found if the power went now, apart from the one that goes on; the
    /// number chooses what of the unsynced writes arrived. `fail_syncs` switches. `damage` changes a byte of a
    /// stored event, while nothing is open; the number chooses which.
    pub fn new<C, CF, S, SF, D, DF>(cut: C, fail_syncs: S, damage: D) -> Self
    where
        C: Fn(u64) -> CF + Send + Sync + 'static,
        CF: Future<Output = Result<Arc<dyn Transport>>> + Send + 'static,
        S: Fn(bool) -> SF + Send + Sync + 'static,
        SF: Future<Output = Result<()>> + Send + 'static,
        D: Fn(u64) -> DF + Send + Sync + 'static,
        DF: Future<Output = Result<()>> + Send + 'static,
    {
        Self {
            cut: Arc::new(move |seed| Box::pin(cut(seed))),
            fail_syncs: Arc::new(move |on| Box::pin(fail_syncs(on))),
            damage: Arc::new(move |seed| Box::pin(damage(seed))),
        }
    }
}

impl Subject {
    /// Names the subject and says how to open a fresh transport value on the same store.
    pub fn new<F, Fut>(name: &'static str, connect: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Arc<dyn Transport>>> + Send + 'static,
    {
        Self {
            name,
            connect: Arc::new(move || Box::pin(connect())),
            raw: None,
            bound: None,
            cut: None,
            fill: None,
            restart: None,
            child: None,
            power: None,
            clock: None,
            settings: Settings::default(),
        }
    }

    /// Replaces times and sizes.
    #[must_use]
    pub fn with_settings(mut self, settings: Settings) -> Self {
        self.settings = settings;
        self
    }

    /// Offers [`Hook::Raw`]: puts a body and headers that are not an event into a topic.
    #[must_use]
    pub fn with_raw<F, Fut>(mut self, raw: F) -> Self
    where
        F: Fn(Topic, Undecodable) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<()>> + Send + 'static,
    {
        self.raw = Some(Arc::new(move |topic, content| Box::pin(raw(topic, content))));
        self
    }

    /// Offers [`Hook::Bound`]: publishing to a topic waits when so many events are unsettled.
    #[must_use]
    pub fn with_bound(mut self, n_events: NonZeroUsize) -> Self {
        self.bound = Some(n_events);
        self
    }

    /// Offers [`Hook::Cut`]: while on, publishes arrive and their answers are lost.
    #[must_use]
    pub fn with_cut<F, Fut>(mut self, cut: F) -> Self
    where
        F: Fn(bool) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<()>> + Send + 'static,
    {
        self.cut = Some(Arc::new(move |on| Box::pin(cut(on))));
        self
    }

    /// Offers [`Hook::Fill`]: while on, the store has no room.
    #[must_use]
    pub fn with_fill<F, Fut>(mut self, fill: F) -> Self
    where
        F: Fn(bool) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<()>> + Send + 'static,
    {
        self.fill = Some(Arc::new(move |on| Box::pin(fill(on))));
        self
    }

    /// Offers [`Hook::Restart`]: ends everything that uses the store, as a crash does, and starts it again.
    #[must_use]
    pub fn with_restart<F, Fut>(mut self, restart: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<()>> + Send + 'static,
    {
        self.restart = Some(Arc::new(move || Box::pin(restart())));
        self
    }

    /// Offers [`Hook::Kill`]: a program that connects to the same store and calls
    /// [`child`](super::child) with the given arguments. Called after the store exists.
    #[must_use]
    pub fn with_child(
        mut self,
        child: impl Fn(&[&str]) -> std::process::Command + Send + Sync + 'static,
    ) -> Self {
        self.child = Some(Arc::new(child));
        self
    }

    /// Offers [`Hook::Power`].
    #[must_use]
    pub fn with_power(mut self, power: Power) -> Self {
        self.power = Some(power);
        self
    }

    /// Offers [`Hook::Clock`]: steps the wall clock of the store and of everything that uses it, forward if the
    /// first argument is true, else backward.
    #[must_use]
    pub fn with_clock<F, Fut>(mut self, step: F) -> Self
    where
        F: Fn(bool, Duration) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<()>> + Send + 'static,
    {
        self.clock = Some(Arc::new(move |forward, by| Box::pin(step(forward, by))));
        self
    }

    /// Returns the name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Returns times and sizes.
    pub fn settings(&self) -> Settings {
        self.settings
    }

    /// Tells whether a hook is offered.
    pub fn has(&self, hook: Hook) -> bool {
        match hook {
            Hook::Raw => self.raw.is_some(),
            Hook::Bound => self.bound.is_some(),
            Hook::Cut => self.cut.is_some(),
            Hook::Fill => self.fill.is_some(),
            Hook::Restart => self.restart.is_some(),
            Hook::Kill => self.child.is_some(),
            Hook::Power => self.power.is_some(),
            Hook::Clock => self.clock.is_some(),
        }
    }

    /// Returns what the transport under test claims.
    ///
    /// # Errors
    /// What opening it reports.
    pub async fn capabilities(&self) -> Result<Capabilities> {
        Ok(self.connect().await?.capabilities())
    }

    pub(super) async fn connect(&self) -> Result<Arc<dyn Transport>> {
        (self.connect)().await
    }

    pub(super) fn bound(&self) -> usize {
        self.bound.map_or(0, NonZeroUsize::get)
    }

    pub(super) async fn raw(&self, topic: &Topic, content: Undecodable) -> Result<()> {
        match &self.raw {
            Some(raw) => raw(topic.clone(), content).await,
            None => Ok(()),
        }
    }

    pub(super) fn child(&self, arguments: &[&str]) -> Option<std::process::Command> {
        self.child.as_ref().map(|child| child(arguments))
    }

    pub(super) async fn cut(&self, on: bool) -> Result<()> {
        switch(&self.cut, on).await
    }

    pub(super) async fn fill(&self, on: bool) -> Result<()> {
        switch(&self.fill, on).await
    }

    pub(super) async fn power_cut(&self, seed: u64) -> Result<Arc<dyn Transport>> {
        match &self.power {
            Some(power) => (power.cut)(seed).await,
            None => self.connect().await,
        }
    }

    pub(super) async fn fail_syncs(&self, on: bool) -> Result<()> {
        switch(&self.power.as_ref().map(|power| power.fail_syncs.clone()), on).await
    }

    pub(super) async fn damage(&self, seed: u64) -> Result<()> {
        match &self.power {
            Some(power) => (power.damage)(seed).await,
            None => Ok(()),
        }
    }

    pub(super) async fn step_clock(&self, forward: bool, by: Duration) -> Result<()> {
        match &self.clock {
            Some(step) => step(forward, by).await,
            None => Ok(()),
        }
    }

    pub(super) async fn restart(&self) -> Result<()> {
        match &self.restart {
            Some(restart) => restart().await,
            None => Ok(()),
        }
    }
}

async fn switch(hook: &Option<Switch>, on: bool) -> Result<()> {
    match hook {
        Some(hook) => hook(on).await,
        None => Ok(()),
    }
}

impl fmt::Debug for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subject")
            .field("name", &self.name)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}
