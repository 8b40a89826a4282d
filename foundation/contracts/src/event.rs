//! Events between services, with the attributes of CloudEvents 1.0. The data has a sequence number and the state
//! of its subject where the order of delivery matters, so that a consumer can ignore an older event.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{Timestamp, Uuid};

/// The data of an event.
pub trait Event: Serialize + DeserializeOwned + Send + Sync + 'static {
    /// `CloudEvents` `type`, such as `organization.member_added`.
    const TYPE: &'static str;
    /// The version of the data's schema. Consumers ignore unknown members.
    const VERSION: u16;
    /// The id of what the event is about: `CloudEvents` `subject`.
    fn subject(&self) -> Uuid;
    /// The organization that the event belongs to, if it belongs to one.
    fn organization(&self) -> Option<Uuid> {
        None
    }
}

/// The types of events with personal data. Their stored copies are deleted when the person's account is erased.
pub const PERSONAL_EVENTS: [&str; 2] = [crate::identity::UserRegistered::TYPE, crate::organization::OrganizationCreated::TYPE];

/// An event as it is sent: `CloudEvents` 1.0 attributes and the data.
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
    /// Events with the same key stay in order: the organization, or else the subject (the partitioning extension of
    /// `CloudEvents`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partitionkey: Option<Uuid>,
    /// The correlation id of the request that caused the event (extension attribute).
    pub correlationid: String,
    pub data: serde_json::Value,
}

impl EventEnvelope {
    /// Wraps an event of the service `source`.
    ///
    /// # Errors
    /// When the data cannot be serialized as JSON.
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
