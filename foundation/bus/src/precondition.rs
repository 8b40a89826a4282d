//! Preconditions of updates (RFC 9110, section 13): the entity tag of the representation that a client has seen.

use capsule_contracts::Problem;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::context::Context;

/// The strong entity tag of a representation, in quotes: a digest of its bytes.
#[must_use]
pub fn entity_tag(representation: &[u8]) -> String {
    format!("\"{}\"", hex::encode(&Sha256::digest(representation)[..16]))
}

/// Whether a list of entity tags, as in `If-Match`, contains this one or is `*`. The tag of a compressed
/// representation, which ends with `-gzip`, counts as that of the representation itself.
#[must_use]
pub fn matches_entity_tag(list: &str, tag: &str) -> bool {
    list.split(',').map(str::trim).any(|item| item == "*" || item == tag || item.replace("-gzip\"", "\"") == tag)
}

impl Context {
    /// Checks the request's `If-Match` against the current representation of the resource, as a `GET` returns it. Call
    /// it in the transaction that changes the resource: then no change is lost.
    ///
    /// # Errors
    /// [`Problem::precondition_failed`] with the current representation, if the client has seen another one.
    pub fn check_if_match<T: Serialize>(&self, current: &T) -> Result<(), Problem> {
        let Some(list) = &self.if_match else { return Ok(()) };
        let bytes = serde_json::to_vec(current).map_err(|_| Problem::internal())?;
        let tag = entity_tag(&bytes);
        if matches_entity_tag(list, &tag) {
            return Ok(());
        }
        let current = serde_json::from_slice(&bytes).map_err(|_| Problem::internal())?;
        Err(Problem::precondition_failed(current, tag))
    }
}

#[cfg(test)]
mod tests {
    use super::{entity_tag, matches_entity_tag};
    use crate::context::{Context, Principal};

    #[test]
    fn an_update_is_refused_unless_the_client_has_seen_the_current_representation() {
        let context = |if_match: Option<String>| Context { if_match, ..Context::new("c".into(), Principal::Anonymous) };
        let current = serde_json::json!({"name": "one", "age": 1});
        let tag = entity_tag(current.to_string().as_bytes());
        for list in [None, Some(tag.clone()), Some("*".into()), Some(format!("\"other\" , {tag}")), Some(tag.replace("\"", ""))] {
            let unquoted = list.as_ref().is_some_and(|list| !list.contains('"') && list != "*");
            assert_eq!(context(list.clone()).check_if_match(&current).is_err(), unquoted, "{list:?}");
        }
        let problem = context(Some("\"other\"".into())).check_if_match(&current).expect_err("refused");
        assert_eq!((problem.status, problem.etag, problem.current.map(|current| *current)), (412, Some(tag), Some(current)));
    }

    #[test]
    fn the_tag_of_a_compressed_representation_counts_and_a_weak_one_does_not() {
        let tag = entity_tag(b"x");
        assert!(matches_entity_tag(&format!("{}-gzip\"", &tag[..tag.len() - 1]), &tag));
        assert!(!matches_entity_tag(&format!("W/{tag}"), &tag));
    }
}
