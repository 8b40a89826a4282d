//! Samples of repeated measurements.

use std::time::Duration;

/// Measured values in ascending order.
pub struct Sample(Vec<f64>);

impl Sample {
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    /// Creates a sample of times in milliseconds.
    pub fn times(values: impl IntoIterator<Item = Duration>) -> Self {
        Self::of(values.into_iter().map(|time| time.as_secs_f64() * 1000.0))
    }

    pub fn median(&self) -> f64 {
        self.percentile(50)
    }

    pub fn percentile(&self, percent: usize) -> f64 {
        self.0[(self.0.len() * percent / 100).min(self.0.len() - 1)]
    }

    /// `median 12.3 ms (11.0 to 15.2, 9 runs)`
    pub fn text(&self, unit: &str) -> String {
        format!("median {:.2} {unit} ({:.2} to {:.2}, {} runs)", self.median(), self.0[0], self.0[self.0.len() - 1], self.0.len())
    }
}
