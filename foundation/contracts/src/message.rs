//! What makes a type a message: subject, kind, access rule, reply and validation.

use std::borrow::Cow;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, Schema, Type};
use utoipa::openapi::{Ref, RefOr};
use utoipa::{PartialSchema, ToSchema};

use crate::list::{List, PageQuery};
use crate::{Access, FieldError, Problem, Target};

/// Whether a message changes anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads only. It is cancelled when the caller stops waiting for the reply.
    Query,
    /// Changes state. Once started, it runs to its end, even if the caller stops waiting.
    Command,
}

/// A request on the bus.
pub trait Message: Serialize + DeserializeOwned + ToSchema + Send + Sync + 'static {
    /// `<service>.<verb_noun>`.
    const SUBJECT: &'static str;
    /// Query or command.
    const KIND: Kind;
    /// Who may send it.
    const ACCESS: Access;
    /// Whether the reply has tokens. Such a reply is returned once and never stored.
    const REPLY_HOLDS_CREDENTIALS: bool = false;
    /// The marker type of `ACCESS`. It decides the type of the handler's grant.
    type Rule;
    /// The type of the reply.
    type Reply: Serialize + DeserializeOwned + ToSchema + Send + 'static;

    /// The target of the message, for rules that require one.
    fn target(&self) -> Option<Target>;

    /// Validates the fields beyond their types.
    fn check(&self, _check: &mut Check) {}

    /// Runs [`Message::check`].
    ///
    /// # Errors
    /// [`Problem::invalid`] with every invalid field.
    fn validate(&self) -> Result<(), Problem> {
        let mut check = Check::default();
        self.check(&mut check);
        if check.errors.is_empty() { Ok(()) } else { Err(Problem::invalid(check.errors)) }
    }
}

/// A message whose reply is a sequence of items of any length. `Reply` is the type of an item.
pub trait StreamMessage: Message {}

/// A message that opens a connection with frames in both directions. `Reply` is the type of the text frames that the
/// handler sends; binary frames have no type.
pub trait DuplexMessage: Message {
    /// The type of the text frames that the client sends.
    type Input: ToSchema;
}

/// Collects the invalid fields of a message.
#[derive(Debug, Default)]
pub struct Check {
    errors: Vec<FieldError>,
}

impl Check {
    /// Records `message` for `field` unless `valid`.
    pub fn require(&mut self, valid: bool, field: &str, message: &str) {
        if !valid {
            self.errors.push(FieldError { field: field.into(), message: message.into() });
        }
    }

    /// Checks the members of a list: its limit, sort field and cursor.
    pub fn list<M: List>(&mut self, message: &M) {
        if let Err(problem) = PageQuery::of(message) {
            self.errors.extend(problem.errors);
        }
    }

    /// Checks a title: 1 to 100 characters, no control characters.
    pub fn title(&mut self, field: &str, text: &str) {
        let valid = (1..=100).contains(&text.trim().chars().count()) && !text.chars().any(char::is_control);
        self.require(valid, field, "must have 1 to 100 characters and no control characters");
    }

    /// Checks a DNS label (RFC 1123), which becomes part of a host name: `a-z`, `0-9` and `-`, at most 40 characters.
    pub fn label(&mut self, field: &str, text: &str) {
        self.require(is_label(text), field, "must have 1 to 40 characters: a-z, 0-9 and -, with no - at the start or end");
    }

    /// Checks the name of an environment variable (POSIX).
    pub fn variable_name(&mut self, field: &str, name: &str) {
        let mut bytes = name.bytes();
        let first = bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
        let valid = first && name.len() <= 255 && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_');
        self.require(valid, field, "must have only letters, digits and _, and not start with a digit");
    }

    /// Checks the value of an environment variable: no NUL, at most 64 KiB.
    pub fn variable_value(&mut self, field: &str, value: &str) {
        self.require(!value.contains('\0') && value.len() <= 65_536, field, "must have at most 65536 bytes and no NUL byte");
    }
}

/// Whether `text` is a DNS label of at most 40 characters.
#[must_use]
pub fn is_label(text: &str) -> bool {
    (1..=40).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// Turns any text into a DNS label, or returns `fallback` if it has no usable character.
#[must_use]
pub fn to_label(text: &str, fallback: &str) -> String {
    let mut label = String::new();
    for c in text.chars().flat_map(char::to_lowercase) {
        if c.is_ascii_lowercase() || c.is_ascii_digit() {
            label.push(c);
        } else if !label.is_empty() && !label.ends_with('-') {
            label.push('-');
        }
        if label.len() >= 40 {
            break;
        }
    }
    let label = label.trim_matches('-');
    if label.is_empty() { fallback.into() } else { label.into() }
}

/// The reply of a message that returns nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Empty {}

/// A file as a reply. The gateway sends its bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Download {
    /// The media type, such as `application/gzip`.
    pub media_type: String,
    /// The name that a browser saves it under.
    pub file_name: String,
    /// The bytes, in base64.
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub content: Vec<u8>,
}

mod base64_bytes {
    use base64::prelude::{BASE64_STANDARD, Engine};
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64_STANDARD.encode(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        BASE64_STANDARD.decode(String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

/// A redirect as a reply. The gateway responds with status 303.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Redirect {
    /// An absolute URL or an absolute path.
    pub location: String,
}

/// The number of items.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Count {
    pub count: i64,
}

/// One page of a list.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// The `cursor` of the next page. Absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

/// Each type of item has a schema of its own, such as `ProjectPage`.
impl<T: ToSchema> ToSchema for Page<T> {
    fn name() -> Cow<'static, str> {
        format!("{}Page", T::name()).into()
    }

    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        schemas.push((T::name().into_owned(), T::schema()));
        T::schemas(schemas);
    }
}

impl<T: ToSchema> PartialSchema for Page<T> {
    fn schema() -> RefOr<Schema> {
        let items = ArrayBuilder::new().items(Ref::from_schema_name(T::name()));
        let cursor = ObjectBuilder::new()
            .schema_type(Type::String)
            .description(Some("The `cursor` of the next page. Absent on the last page."));
        ObjectBuilder::new().property("items", items).required("items").property("next_cursor", cursor).into()
    }
}

impl<T> Page<T> {
    /// A list that is complete on one page.
    #[must_use]
    pub fn whole(items: Vec<T>) -> Self {
        Self { items, next_cursor: None }
    }
}

/// Binds a type to its subject, kind, access rule and reply:
/// `message!(GetProject, query "project.get_project", Granted(ProjectView) at Project(id) => Project);`
///
/// `=> Session; credentials` sets [`Message::REPLY_HOLDS_CREDENTIALS`]. A function that checks the fields can follow.
#[macro_export]
macro_rules! message {
    ($name:ident, $kind:ident $subject:literal, Granted($permission:ident) at $target:ident($($field:ident),+) => $reply:ty $(; $flag:ident)? $(, $check:expr)?) => {
        $crate::message!(@impl $name, $kind, $subject, Granted, $crate::Access::Granted($crate::Permission::$permission), $reply, [$($flag)?],
            |m: &$name| Some($crate::Target::$target($(m.$field.clone()),+)) $(, $check)?);
    };
    ($name:ident, $kind:ident $subject:literal, GrantedDeploy at $target:ident($($field:ident),+) => $reply:ty $(; $flag:ident)? $(, $check:expr)?) => {
        $crate::message!(@impl $name, $kind, $subject, Granted, $crate::Access::GrantedDeploy, $reply, [$($flag)?],
            |m: &$name| Some($crate::Target::$target($(m.$field.clone()),+)) $(, $check)?);
    };
    ($name:ident, $kind:ident $subject:literal, GrantedAndDeploy($permission:ident) at $target:ident($($field:ident),+) => $reply:ty $(; $flag:ident)? $(, $check:expr)?) => {
        $crate::message!(@impl $name, $kind, $subject, Granted, $crate::Access::GrantedAndDeploy($crate::Permission::$permission), $reply, [$($flag)?],
            |m: &$name| Some($crate::Target::$target($(m.$field.clone()),+)) $(, $check)?);
    };
    ($name:ident, $kind:ident $subject:literal, Invited at $target:ident($field:ident) => $reply:ty $(; $flag:ident)? $(, $check:expr)?) => {
        $crate::message!(@impl $name, $kind, $subject, Invited, $crate::Access::Invited, $reply, [$($flag)?],
            |m: &$name| Some($crate::Target::$target(m.$field)) $(, $check)?);
    };
    ($name:ident, $kind:ident $subject:literal, $rule:ident => $reply:ty $(; $flag:ident)? $(, $check:expr)?) => {
        $crate::message!(@impl $name, $kind, $subject, $rule, $crate::Access::$rule, $reply, [$($flag)?], |_: &$name| None $(, $check)?);
    };
    (@kind query) => { $crate::Kind::Query };
    (@kind command) => { $crate::Kind::Command };
    (@credentials credentials) => { true };
    (@credentials) => { false };
    (@impl $name:ident, $kind:ident, $subject:literal, $rule:ident, $access:expr, $reply:ty, [$($flag:ident)?], $target:expr $(, $check:expr)?) => {
        impl $crate::Message for $name {
            const SUBJECT: &'static str = $subject;
            const KIND: $crate::Kind = $crate::message!(@kind $kind);
            const ACCESS: $crate::Access = $access;
            const REPLY_HOLDS_CREDENTIALS: bool = $crate::message!(@credentials $($flag)?);
            type Rule = $crate::access::rule::$rule;
            type Reply = $reply;
            fn target(&self) -> Option<$crate::Target> {
                let target: fn(&$name) -> Option<$crate::Target> = $target;
                target(self)
            }
            $(fn check(&self, check: &mut $crate::Check) {
                let run: fn(&$name, &mut $crate::Check) = $check;
                run(self, check);
            })?
        }
    };
}

#[cfg(test)]
mod tests {
    use super::{Check, Message, is_label, to_label};
    use crate::{identity, organization};

    #[test]
    fn replies_with_tokens_hold_credentials() {
        const {
            assert!(identity::Register::REPLY_HOLDS_CREDENTIALS && identity::Login::REPLY_HOLDS_CREDENTIALS);
            assert!(identity::LocalLogin::REPLY_HOLDS_CREDENTIALS && identity::RefreshToken::REPLY_HOLDS_CREDENTIALS);
            assert!(identity::InviteUser::REPLY_HOLDS_CREDENTIALS && organization::AddMember::REPLY_HOLDS_CREDENTIALS);
            assert!(!identity::GetProfile::REPLY_HOLDS_CREDENTIALS);
        }
    }

    #[test]
    fn any_text_becomes_a_label() {
        for (text, label) in [("My App_v2", "my-app-v2"), ("--x--", "x"), ("日本", "app"), ("", "app")] {
            assert_eq!(to_label(text, "app"), label);
        }
        assert!(is_label(&to_label(&"ab-".repeat(40), "app")));
    }

    #[test]
    fn variable_names_follow_posix() {
        for (name, valid) in [("PORT", true), ("_x1", true), ("1X", false), ("A-B", false), ("", false), ("A=B", false)] {
            let mut check = Check::default();
            check.variable_name("name", name);
            assert_eq!(check.errors.is_empty(), valid, "{name}");
        }
    }
}
