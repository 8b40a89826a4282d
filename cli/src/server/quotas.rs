//! The settings `quotas.<name>`: the limits of organizations without limits of their own.

use capsule_contracts::quotas::{Quantity, Quotas};
use serde::de::Error;
use serde::{Deserialize, Deserializer};

/// Deserializes limits by name. Unlike in events, an unknown name is an error.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Quotas, D::Error> {
    let quotas = Quotas::deserialize(deserializer)?;
    for (name, limit) in &quotas.0 {
        if let Some(why) = Quantity::limit_error(name, *limit) {
            return Err(D::Error::custom(format!("quotas.{name}: {why}")));
        }
    }
    Ok(quotas)
}
