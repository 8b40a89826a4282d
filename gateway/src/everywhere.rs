//! Requests that every service answers for itself: lists are put together, and a single thing is wherever it
//! is found.

use capsule_bus::{Bus, Context};
use capsule_contracts::Problem;
use capsule_contracts::operations::{SERVICES, addressed};
use futures_util::future::join_all;
use serde_json::{Value, json};

/// Asks every service. A list is whole, or an error: nobody is to take half of it for all.
pub async fn ask(bus: &Bus, context: &Context, subject: &str, message: Vec<u8>) -> Result<Vec<u8>, Problem> {
    let asked = SERVICES.map(|service| bus.request_raw(context, addressed(service, subject), message.clone()));
    let (mut items, mut single, mut refusal) = (Vec::new(), None, None);
    for answer in join_all(asked).await {
        match answer.map(|bytes| serde_json::from_slice::<Value>(&bytes)) {
            Ok(Ok(Value::Object(mut object))) => match object.remove("items") {
                Some(Value::Array(more)) => items.extend(more),
                _ => single = Some(Value::Object(object)),
            },
            Ok(_) => return Err(Problem::internal()),
            Err(problem) if problem.code == "not_found" => refusal = refusal.or(Some(problem)),
            Err(problem) => refusal = Some(problem),
        }
    }
    let answer = match (single, refusal) {
        (Some(single), _) => single,
        (None, Some(problem)) => return Err(problem),
        (None, None) => {
            // Ids sort by the time they were made.
            items.sort_by(|one, other| other["id"].as_str().cmp(&one["id"].as_str()));
            json!({ "items": items })
        }
    };
    serde_json::to_vec(&answer).map_err(|_| Problem::internal())
}
