//! Tests of the table of endpoints and its documentation.

use std::collections::BTreeSet;

use capsule_contracts::Access;

use crate::{openapi, rows};

#[test]
fn rows_have_distinct_endpoints_and_no_internal_message() {
    let mut seen = BTreeSet::new();
    for row in rows::all() {
        assert!(seen.insert((row.method.as_str(), row.path)), "{} {} twice", row.method, row.path);
        assert_ne!(row.access, Access::Internal, "{} {}", row.method, row.path);
    }
}

#[test]
fn the_document_contains_every_row_and_every_referenced_schema() {
    let document: serde_json::Value = serde_json::from_str(&openapi().to_json().expect("JSON")).expect("parses");
    for row in rows::all() {
        let operation = &document["paths"][format!("/api/v1{}", row.path)][row.method.as_str().to_lowercase()];
        assert_eq!(operation["operationId"], row.subject);
        assert!(operation["summary"].as_str().is_some_and(|text| !text.is_empty()), "{} says nothing", row.subject);
    }
    let mut referred = BTreeSet::new();
    collect(&document, &mut referred);
    for name in referred {
        let name = name.trim_start_matches("#/components/schemas/");
        assert!(document["components"]["schemas"].get(name).is_some(), "{name} is referred to but not described");
    }
}

#[test]
fn the_document_changes_only_on_purpose() {
    insta::assert_snapshot!(openapi().to_yaml().expect("YAML"));
}

fn collect(value: &serde_json::Value, referred: &mut BTreeSet<String>) {
    match value {
        serde_json::Value::Object(object) => {
            for (name, value) in object {
                if let (true, Some(text)) = (name == "$ref", value.as_str()) {
                    referred.insert(text.to_owned());
                }
                collect(value, referred);
            }
        }
        serde_json::Value::Array(items) => items.iter().for_each(|item| collect(item, referred)),
        _ => {}
    }
}
