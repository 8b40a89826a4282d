//! The settings `quotas.<name>`: what every organization may use that has no limits of its own.

use capsule_contracts::quotas::{Quantity, Quotas};
use serde::de::Error;
use serde::{Deserialize, Deserializer};

/// Reads limits by the names of their quantities. An unknown name is a mistake here; in an event it is not.
pub fn known<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Quotas, D::Error> {
    let quotas = Quotas::deserialize(deserializer)?;
    for (name, limit) in &quotas.0 {
        if let Some(why) = Quantity::refusal(name, *limit) {
            return Err(D::Error::custom(format!("quotas.{name}: {why}")));
        }
    }
    Ok(quotas)
}
