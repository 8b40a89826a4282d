//! The API's documentation: an OpenAPI document generated from the table of endpoints and the contract types, and a
//! page (Swagger UI) to read and try it.

use axum::Router;
use axum::extract::Path;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use utoipa::openapi::path::{HttpMethod, OperationBuilder, ParameterBuilder, ParameterIn, PathItem};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::schema::{ComponentsBuilder, Object};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    Content, InfoBuilder, OpenApi, OpenApiBuilder, PathsBuilder, Ref, RefOr, Required, ResponseBuilder, Schema, Server,
};

use capsule_contracts::{Access, Problem};
use utoipa::{PartialSchema, ToSchema};

use crate::rows::{self, Row, RowKind};

/// The OpenAPI document of all endpoints.
#[must_use]
pub fn openapi() -> OpenApi {
    let mut paths = PathsBuilder::new();
    let mut components = ComponentsBuilder::new()
        .security_scheme("token", SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)))
        .schema(Problem::name(), Problem::schema());
    let mut others = Vec::new();
    Problem::schemas(&mut others);
    for row in rows::all() {
        paths = paths.path(format!("/api/v1{}", row.path), PathItem::new(http_method(row), operation(row)));
        components = components.schema(row.reply.name.clone(), row.reply.schema.clone());
        if row.takes_json() && needs_body(row) {
            components = components.schema(row.message.name.clone(), row.message.schema.clone());
        }
        if let RowKind::Duplex { input } = &row.kind {
            components = components.schema(input.name.clone(), input.schema.clone());
            others.extend(input.others.iter().cloned());
        }
        others.extend(row.message.others.iter().chain(&row.reply.others).cloned());
    }
    for (name, schema) in others {
        components = components.schema(name, schema);
    }
    let info = InfoBuilder::new()
        .title("Capsule")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some("A self-hosted application platform: from a folder to a URL. Errors are RFC 9457 problems."));
    OpenApiBuilder::new()
        .info(info.build())
        .servers(Some([Server::new("/")]))
        .paths(paths.build())
        .components(Some(components.build()))
        .build()
}

fn http_method(row: &Row) -> HttpMethod {
    match row.method.as_str() {
        "POST" => HttpMethod::Post,
        "PUT" => HttpMethod::Put,
        "PATCH" => HttpMethod::Patch,
        "DELETE" => HttpMethod::Delete,
        _ => HttpMethod::Get,
    }
}

fn path_parameters(row: &Row) -> Vec<&str> {
    row.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}')).collect()
}

fn object(schema: &RefOr<Schema>) -> Option<&Object> {
    match schema {
        RefOr::T(Schema::Object(object)) => Some(object),
        _ => None,
    }
}

/// Whether the message has members that are not in the path.
fn needs_body(row: &Row) -> bool {
    let inside = path_parameters(row);
    row.method != "GET"
        && object(&row.message.schema).is_some_and(|all| all.properties.keys().any(|name| !inside.contains(&name.as_str())))
}

fn operation(row: &Row) -> OperationBuilder {
    let tag = row.subject.split('.').next().unwrap_or_default();
    let all = object(&row.message.schema);
    let mut operation = OperationBuilder::new()
        .operation_id(Some(row.subject))
        .tag(if tag == "auth" { "identity" } else { tag })
        .summary(Some(summary(row)))
        .description(Some(access_text(row.access)));
    let inside = path_parameters(row);
    for name in &inside {
        let schema = all.and_then(|object| object.properties.get(*name).cloned());
        operation = operation.parameter(
            ParameterBuilder::new().name(*name).parameter_in(ParameterIn::Path).required(Required::True).schema(schema),
        );
    }
    if !row.takes_json() {
        for (name, schema) in
            all.into_iter().flat_map(|object| &object.properties).filter(|(name, _)| !inside.contains(&name.as_str()))
        {
            let required = all.is_some_and(|object| object.required.contains(name));
            let required = if required { Required::True } else { Required::False };
            let parameter = ParameterBuilder::new().name(name).parameter_in(ParameterIn::Query).required(required);
            operation = operation.parameter(parameter.schema(Some(schema.clone())));
        }
    } else if needs_body(row) {
        let content = Content::new(Some(Ref::from_schema_name(row.message.name.clone())));
        operation = operation.request_body(Some(
            RequestBodyBuilder::new().content("application/json", content).required(Some(Required::True)).build(),
        ));
    }
    if let RowKind::Raw { media_type, .. } = row.kind {
        let body = RequestBodyBuilder::new().content(media_type, Content::new(None::<RefOr<Schema>>));
        operation = operation.request_body(Some(body.required(Some(Required::True)).build()));
    }
    if row.has_entity_tag() {
        let (name, text, status, response) = match row.is_update() {
            true => ("If-Match", "The ETag that you have seen; another current one is status 412.", "412", problem()),
            false => {
                let unchanged = ResponseBuilder::new().description("Not changed").build();
                ("If-None-Match", "The ETag that you have; if it is current, the reply is status 304.", "304", unchanged)
            }
        };
        let parameter = ParameterBuilder::new().name(name).parameter_in(ParameterIn::Header).required(Required::False);
        let schema = Object::with_type(utoipa::openapi::schema::Type::String);
        operation = operation.parameter(parameter.description(Some(text)).schema(Some(schema))).response(status, response);
    }
    operation = operation.response(row.success.as_str(), success(row)).response("default", problem());
    if row.access == Access::Public {
        operation
    } else {
        operation.security(SecurityRequirement::new("token", Vec::<String>::new()))
    }
}

fn summary(row: &Row) -> String {
    match (&row.kind, object(&row.message.schema)) {
        (RowKind::Raw { summary, .. }, _) => (*summary).to_owned(),
        (_, Some(object)) => object.description.as_deref().map(first_sentence).unwrap_or_default(),
        (_, None) => String::new(),
    }
}

fn success(row: &Row) -> utoipa::openapi::Response {
    let reply = Content::new(Some(Ref::from_schema_name(row.reply.name.clone())));
    let response = ResponseBuilder::new();
    match &row.kind {
        RowKind::Json { .. } | RowKind::Raw { .. } => response.description("Success").content("application/json", reply),
        RowKind::Stream => response.description("Success").content("application/x-ndjson", reply),
        RowKind::Download => {
            response.description("A file").content("application/octet-stream", Content::new(None::<RefOr<Schema>>))
        }
        RowKind::Redirect => response.description("A redirect; see the header Location"),
        RowKind::Duplex { input } => response.description(format!(
            "A WebSocket. Text frames are JSON: the client sends {}, the server sends {}.",
            input.name, row.reply.name
        )),
    }
    .build()
}

fn problem() -> utoipa::openapi::Response {
    let content = Content::new(Some(Ref::from_schema_name(Problem::name())));
    ResponseBuilder::new()
        .description("What went wrong, and what to do about it")
        .content("application/problem+json", content)
        .build()
}

fn first_sentence(text: &str) -> String {
    text.split("\n\n").next().unwrap_or_default().replace('\n', " ")
}

fn access_text(access: Access) -> String {
    match access {
        Access::Public => "No authentication required.".into(),
        Access::SignedIn => "Requires a signed-in user.".into(),
        Access::PlatformAdmin => "Requires an administrator of the installation.".into(),
        Access::Invited => "Requires the signed-in user who is invited.".into(),
        Access::Internal => "Only for services of the platform.".into(),
        Access::Granted(permission) => format!("Requires the permission {}.", permission.name()),
        Access::GrantedAndDeploy(permission) => format!(
            "Requires the permission {}, and deploy:production, deploy:staging or deploy:dev for every environment that it affects.",
            permission.name()
        ),
        Access::GrantedDeploy => {
            "Requires deploy:production, deploy:staging or deploy:dev, depending on the kind of environment.".into()
        }
    }
}

/// The routes `/api/documentation`, `/api/documentation.json` and `/api/documentation.yaml`.
pub fn router() -> Router {
    Router::new()
        .route(
            "/api/documentation.json",
            get(|| async { ([(header::CONTENT_TYPE, "application/json")], openapi().to_json().unwrap_or_default()) }),
        )
        .route(
            "/api/documentation.yaml",
            get(|| async { ([(header::CONTENT_TYPE, "application/yaml")], openapi().to_yaml().unwrap_or_default()) }),
        )
        .route("/api/documentation", get(|| async { Redirect::permanent("/api/documentation/") }))
        .route("/api/documentation/", get(|| file(String::new())))
        .route("/api/documentation/{*file}", get(|Path(name): Path<String>| file(name)))
}

async fn file(name: String) -> Response {
    let config = std::sync::Arc::new(utoipa_swagger_ui::Config::from("/api/documentation.json").persist_authorization(false));
    match utoipa_swagger_ui::serve(&name, config) {
        Ok(Some(file)) => ([(header::CONTENT_TYPE, file.content_type)], file.bytes.into_owned()).into_response(),
        Ok(None) | Err(_) => StatusCode::NOT_FOUND.into_response(),
    }
}
