//! Requests that are sent to every service: lists are merged, and a single resource is taken from the service that
//! has it.

use capsule_bus::{Bus, Context};
use capsule_contracts::Problem;
use capsule_contracts::list::PageQuery;
use capsule_contracts::operations::{SERVICES, service_subject};
use futures_util::future::join_all;
use serde_json::{Value, json};

/// Sends a request to every service and merges the replies. If one service fails, a list is an error, never partial.
pub async fn request(bus: &Bus, context: &Context, subject: &str, message: Vec<u8>) -> Result<Vec<u8>, Problem> {
    let members: Value = serde_json::from_slice(&message).map_err(|_| Problem::internal())?;
    let requests = SERVICES.map(|service| bus.request_raw(context, service_subject(service, subject), message.clone()));
    let (mut items, mut more, mut single, mut failure) = (Vec::new(), false, None, None);
    for reply in join_all(requests).await {
        match reply.map(|bytes| serde_json::from_slice::<Value>(&bytes)) {
            Ok(Ok(Value::Object(mut object))) => match object.remove("items") {
                Some(Value::Array(page)) => {
                    items.extend(page);
                    more |= object.contains_key("next_cursor");
                }
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
        (None, None) => merged(&members, items, more)?,
    };
    serde_json::to_vec(&reply).map_err(|_| Problem::internal())
}

/// The page of the whole list, of every service's page. All are sorted by id, which is by creation time.
fn merged(members: &Value, mut items: Vec<Value>, more: bool) -> Result<Value, Problem> {
    let limit = members["limit"].as_u64().and_then(|limit| u32::try_from(limit).ok());
    let query = PageQuery::new(&["-id"], None, limit, members["sort"].as_str())?;
    items.sort_by(|one, other| one["id"].as_str().cmp(&other["id"].as_str()));
    if query.descending() {
        items.reverse();
    }
    let more = more || items.len() > query.limit();
    items.truncate(query.limit());
    let last = items.last().and_then(|item| item["id"].as_str()).filter(|_| more);
    Ok(match last {
        Some(id) => json!({ "next_cursor": query.cursor_after(id.into(), id), "items": items }),
        None => json!({ "items": items }),
    })
}

#[cfg(test)]
mod tests {
    use super::merged;
    use capsule_contracts::list::PageQuery;
    use serde_json::json;

    #[test]
    fn pages_of_several_services_become_one_page_of_the_newest() {
        let items = vec![json!({"id": "3"}), json!({"id": "1"}), json!({"id": "4"}), json!({"id": "2"})];
        let page = merged(&json!({"limit": 3}), items.clone(), false).expect("valid");
        assert_eq!(page["items"], json!([{"id": "4"}, {"id": "3"}, {"id": "2"}]));
        let next = PageQuery::new(&["-id"], page["next_cursor"].as_str(), None, None).expect("the services' own cursor");
        assert_eq!(next.text(), Ok("2"));
        let whole = merged(&json!({"sort": "id"}), items, false).expect("valid");
        assert_eq!((&whole["items"][0]["id"], whole.get("next_cursor")), (&json!("1"), None));
    }
}
