//! Facts that services tell each other. Each carries the CloudEvents 1.0 attributes, the sequence
//! and the state of the thing it is about, so that order of arrival does not matter.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{Timestamp, Uuid};

/// A fact another service may want to know.
pub trait Event: Serialize + DeserializeOwned + Send + Sync + 'static {
    /// `CloudEvents` `type`, such as `organization.member_added`.
    const TYPE: &'static str;
    /// Version of the payload's shape; readers tolerate unknown members.
    const VERSION: u16;
    /// The thing it is about, `CloudEvents` `subject`.
    fn subject(&self) -> Uuid;
    /// The organization it happened in, where there is one.
    fn organization(&self) -> Option<Uuid> {
        None
    }
}

/// The types of events whose payload tells who a person is; whoever keeps one drops it when that person is erased.
pub const PERSONAL: [&str; 2] = [crate::identity::UserRegistered::TYPE, crate::organization::OrganizationCreated::TYPE];

/// An event on its way: `CloudEvents` 1.0 attributes around the payload.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EventEnvelope {
    pub specversion: String,
    pub id: Uuid,
    pub source: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub subject: Uuid,
    pub time: Timestamp,
    pub dataschema: String,
    /// What keeps its order among others of the same key: the organization, or else the subject
    /// (the CloudEvents partitioning extension).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partitionkey: Option<Uuid>,
    /// Correlation id of the request that caused it (extension attribute).
    pub correlationid: String,
    pub data: serde_json::Value,
}

impl EventEnvelope {
    /// Wraps `event`, said by the service `source`.
    ///
    /// # Errors
    /// When the payload cannot be written as JSON.
    pub fn wrap<E: Event>(source: &str, correlation_id: &str, event: &E) -> Result<Self, serde_json::Error> {
        Ok(Self {
            specversion: "1.0".into(),
            id: crate::new_id(),
            source: format!("/capsule/{source}"),
            kind: E::TYPE.into(),
            subject: event.subject(),
            time: Timestamp::now(),
            dataschema: format!("/schemas/{}/v{}", E::TYPE, E::VERSION),
            partitionkey: Some(event.organization().unwrap_or_else(|| event.subject())),
            correlationid: correlation_id.into(),
            data: serde_json::to_value(event)?,
        })
    }
}
