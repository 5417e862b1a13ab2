//! How fast many events are published.

use std::time::{Duration, Instant};

/// Events a second, from a beginning on: as many as can be, where nothing is said.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    started: Instant,
    rate: Option<f64>,
    ramp: f64,
}

impl Pace {
    /// Begins now.
    pub(crate) fn begin(rate: Option<f64>) -> Self {
        Self { started: Instant::now(), rate, ramp: 0.0 }
    }

    /// Reaches its rate after so long, evenly from none.
    pub(crate) fn with_ramp(mut self, ramp: Duration) -> Self {
        self.ramp = ramp.as_secs_f64();
        self
    }

    /// How many events may go at once: those of a tenth of a second, at most `most`.
    pub(crate) fn window(&self, most: usize) -> usize {
        self.rate.map_or(most, |rate| (rate / 10.0).ceil().clamp(1.0, most as f64) as usize)
    }

    /// How long has gone by.
    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Waits until `n` events may have gone.
    pub(crate) async fn keep(&self, n: u64) {
        tokio::time::sleep(self.due(n as f64).saturating_sub(self.elapsed())).await;
    }

    /// When the `n`th is due: while the rate grows evenly, the events grow with the square of the time.
    fn due(&self, n: f64) -> Duration {
        let Some(rate) = self.rate else { return Duration::ZERO };
        let seconds = match n < rate * self.ramp / 2.0 {
            true => (2.0 * self.ramp * n / rate).sqrt(),
            false => n / rate + self.ramp / 2.0,
        };
        Duration::from_secs_f64(seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ramp_ends_at_its_rate() {
        let even = Pace::begin(Some(100.0));
        assert_eq!(even.due(250.0), Duration::from_millis(2500));
        assert_eq!((even.window(256), even.window(4), Pace::begin(None).window(256)), (10, 4, 256));
        let slow = even.with_ramp(Duration::from_secs(10));
        // A quarter of the events of the ramp in half of its time, and the rate itself from its end on.
        assert_eq!(slow.due(125.0), Duration::from_secs(5));
        assert_eq!(slow.due(500.0), Duration::from_secs(10));
        assert_eq!(slow.due(600.0), Duration::from_secs(11));
        assert_eq!(Pace::begin(None).with_ramp(Duration::from_secs(9)).due(5.0), Duration::ZERO);
    }
}
