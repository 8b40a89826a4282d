//! Requests that are sent to every service: lists are merged, and a single resource is taken from the service that
//! has it.

use capsule_bus::{Bus, Context};
use capsule_contracts::Problem;
use capsule_contracts::operations::{SERVICES, service_subject};
use futures_util::future::join_all;
use serde_json::{Value, json};

/// Sends a request to every service and merges the replies. If one service fails, a list is an error, never partial.
pub async fn request(bus: &Bus, context: &Context, subject: &str, message: Vec<u8>) -> Result<Vec<u8>, Problem> {
    let requests = SERVICES.map(|service| bus.request_raw(context, service_subject(service, subject), message.clone()));
    let (mut items, mut single, mut failure) = (Vec::new(), None, None);
    for reply in join_all(requests).await {
        match reply.map(|bytes| serde_json::from_slice::<Value>(&bytes)) {
            Ok(Ok(Value::Object(mut object))) => match object.remove("items") {
                Some(Value::Array(more)) => items.extend(more),
                _ => single = Some(Value::Object(object)),
            },
            Ok(_) => return Err(Problem::internal()),
            Err(problem) if problem.code == "not_found" => failure = failure.or(Some(problem)),
            Err(problem) => failure = Some(problem),
        }
    }
    let reply = match (single, failure) {
        (Some(single), _) => single,
        (None, Some(problem)) => return Err(problem),
        (None, None) => {
            // Newest first: ids sort by creation time.
            items.sort_by(|one, other| other["id"].as_str().cmp(&one["id"].as_str()));
            json!({ "items": items })
        }
    };
    serde_json::to_vec(&reply).map_err(|_| Problem::internal())
}
