//! Lists in pages. A cursor has the sort field, the value of that field in the last item, and a unique value that
//! orders items with equal ones (keyset pagination): pages stay complete while items are created and deleted.

use base64::prelude::{BASE64_URL_SAFE_NO_PAD, Engine};
use serde::{Deserialize, Serialize};

use crate::{Message, Page, Problem, Uuid};

/// The largest page.
pub const MAX_LIMIT: u32 = 200;
/// The size of a page unless the request gives one.
pub const DEFAULT_LIMIT: u32 = 50;

/// A message that lists items in pages. Declared by [`list!`](crate::list).
pub trait List: Message {
    /// The fields that the list can be sorted by. The first is the default; `-` before it means descending.
    const SORTS: &'static [&'static str];

    /// The members `cursor`, `limit` and `sort`.
    fn page_members(&self) -> (Option<&str>, Option<u32>, Option<&str>);
}

/// The value of the sort field in the last item of a page.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum SortKey {
    Integer(i64),
    Text(String),
}

impl From<i64> for SortKey {
    fn from(value: i64) -> Self {
        Self::Integer(value)
    }
}

impl From<&str> for SortKey {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<Uuid> for SortKey {
    fn from(value: Uuid) -> Self {
        Self::Text(value.to_string())
    }
}

#[derive(Serialize, Deserialize)]
struct Cursor(String, SortKey, String);

/// Which page of a list is requested.
#[derive(Clone, Debug)]
pub struct PageQuery {
    sort: &'static str,
    descending: bool,
    after: Option<(SortKey, String)>,
    limit: u32,
}

impl PageQuery {
    /// The page that a message requests.
    ///
    /// # Errors
    /// [`Problem::invalid_field`] for a limit, a sort field or a cursor that the list does not accept.
    pub fn of<M: List>(message: &M) -> Result<Self, Problem> {
        let (cursor, limit, sort) = message.page_members();
        Self::new(M::SORTS, cursor, limit, sort)
    }

    /// As [`PageQuery::of`], for a list with these sort fields.
    ///
    /// # Errors
    /// As [`PageQuery::of`].
    pub fn new(
        sorts: &'static [&'static str],
        cursor: Option<&str>,
        limit: Option<u32>,
        sort: Option<&str>,
    ) -> Result<Self, Problem> {
        let limit = limit.unwrap_or(DEFAULT_LIMIT);
        if !(1..=MAX_LIMIT).contains(&limit) {
            return Err(Problem::invalid_field("limit", format!("must be 1 to {MAX_LIMIT}")));
        }
        let name = |sort: &'static str| sort.strip_prefix('-').unwrap_or(sort);
        let wanted = sort.unwrap_or(sorts[0]);
        let (field, descending) = wanted.strip_prefix('-').map_or((wanted, false), |field| (field, true));
        let field = sorts.iter().map(|sort| name(sort)).find(|known| *known == field).ok_or_else(|| {
            let known: Vec<&str> = sorts.iter().map(|sort| name(sort)).collect();
            Problem::invalid_field("sort", format!("must be one of {}, with - before it for descending", known.join(", ")))
        })?;
        let mut query = Self { sort: field, descending, after: None, limit };
        if let Some(cursor) = cursor {
            let foreign = || Problem::invalid_field("cursor", "is not the next_cursor of a page of this list in this order");
            let bytes = BASE64_URL_SAFE_NO_PAD.decode(cursor).map_err(|_| foreign())?;
            let Cursor(order, key, tie) = serde_json::from_slice(&bytes).map_err(|_| foreign())?;
            if order != query.order() {
                return Err(foreign());
            }
            query.after = Some((key, tie));
        }
        Ok(query)
    }

    fn order(&self) -> String {
        format!("{}{}", if self.descending { "-" } else { "" }, self.sort)
    }

    /// The sort field.
    #[must_use]
    pub fn sort(&self) -> &'static str {
        self.sort
    }

    /// Whether the order is descending.
    #[must_use]
    pub fn descending(&self) -> bool {
        self.descending
    }

    /// Whether this is the first page.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.after.is_none()
    }

    /// The largest number of items on the page.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit as usize
    }

    /// How many rows to read: one more than the page has, which tells whether there is a next page.
    #[must_use]
    pub fn rows(&self) -> i64 {
        i64::from(self.limit) + 1
    }

    /// The last item's sort value, 0 on the first page.
    ///
    /// # Errors
    /// When the cursor has a value of another type.
    pub fn integer(&self) -> Result<i64, Problem> {
        match &self.after {
            None => Ok(0),
            Some((SortKey::Integer(value), _)) => Ok(*value),
            Some(_) => Err(malformed()),
        }
    }

    /// The last item's sort value, empty on the first page.
    ///
    /// # Errors
    /// When the cursor has a value of another type.
    pub fn text(&self) -> Result<&str, Problem> {
        match &self.after {
            None => Ok(""),
            Some((SortKey::Text(value), _)) => Ok(value),
            Some(_) => Err(malformed()),
        }
    }

    /// The last item's sort value, nil on the first page.
    ///
    /// # Errors
    /// When the cursor has a value of another type.
    pub fn uuid(&self) -> Result<Uuid, Problem> {
        if self.is_first() { Ok(Uuid::nil()) } else { self.text()?.parse().map_err(|_| malformed()) }
    }

    /// The last item's unique value, empty on the first page.
    ///
    /// # Errors
    /// Never; for use beside [`PageQuery::tie_uuid`].
    pub fn tie_text(&self) -> Result<&str, Problem> {
        Ok(self.after.as_ref().map_or("", |(_, tie)| tie))
    }

    /// The last item's unique value, nil on the first page.
    ///
    /// # Errors
    /// When the cursor has no id.
    pub fn tie_uuid(&self) -> Result<Uuid, Problem> {
        self.after.as_ref().map_or(Ok(Uuid::nil()), |(_, tie)| tie.parse().map_err(|_| malformed()))
    }

    /// The cursor of the page after the item with these values.
    #[must_use]
    pub fn cursor_after(&self, key: SortKey, tie: impl std::fmt::Display) -> String {
        let cursor = Cursor(self.order(), key, tie.to_string());
        BASE64_URL_SAFE_NO_PAD.encode(serde_json::to_vec(&cursor).unwrap_or_default())
    }

    /// A page made of rows in the list's order, of which the one beyond the page is left out. `key` returns the
    /// row's sort value and its unique value.
    pub fn page<R, D: std::fmt::Display>(&self, mut rows: Vec<R>, key: impl Fn(&R) -> (SortKey, D)) -> Page<R> {
        let more = rows.len() > self.limit();
        rows.truncate(self.limit());
        let next_cursor = rows.last().filter(|_| more).map(|last| {
            let (value, tie) = key(last);
            self.cursor_after(value, tie)
        });
        Page { items: rows, next_cursor }
    }
}

fn malformed() -> Problem {
    Problem::invalid_field("cursor", "is malformed")
}

impl<R> Page<R> {
    /// The page with each item converted.
    ///
    /// # Errors
    /// The first error of `convert`.
    pub fn try_map<T>(self, convert: impl FnMut(R) -> Result<T, Problem>) -> Result<Page<T>, Problem> {
        let items = self.items.into_iter().map(convert).collect::<Result<_, _>>()?;
        Ok(Page { items, next_cursor: self.next_cursor })
    }

    /// As [`Page::try_map`], for a conversion that cannot fail.
    pub fn map<T>(self, convert: impl FnMut(R) -> T) -> Page<T> {
        Page { items: self.items.into_iter().map(convert).collect(), next_cursor: self.next_cursor }
    }
}

/// Declares the type of a message that lists items: its own members, and `cursor`, `limit` and `sort`.
/// The sort fields are listed with the default first.
#[macro_export]
macro_rules! list {
    ($(#[$meta:meta])* $name:ident by [$($sort:literal),+] { $($(#[$field_meta:meta])* $field:ident: $type:ty),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
        pub struct $name {
            $($(#[$field_meta])* pub $field: $type,)*
            /// The `next_cursor` of the previous page.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub cursor: Option<String>,
            /// The largest number of items on the page: 1 to 200, 50 by default.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub limit: Option<u32>,
            /// The field to sort by, with `-` before it for descending order.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub sort: Option<String>,
        }
        impl $crate::list::List for $name {
            const SORTS: &'static [&'static str] = &[$($sort),+];
            fn page_members(&self) -> (Option<&str>, Option<u32>, Option<&str>) {
                (self.cursor.as_deref(), self.limit, self.sort.as_deref())
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::{PageQuery, SortKey};

    const SORTS: &[&str] = &["-created_at", "name"];

    #[test]
    fn a_page_ends_with_a_cursor_that_fits_only_its_own_order() {
        let query = PageQuery::new(SORTS, None, Some(2), None).expect("valid");
        assert_eq!((query.sort(), query.descending(), query.is_first()), ("created_at", true, true));
        let page = query.page(vec![(9, "a"), (8, "b"), (7, "c")], |row| (SortKey::Integer(row.0), row.1));
        assert_eq!(page.items.len(), 2);
        let cursor = page.next_cursor.expect("there are more");
        let next = PageQuery::new(SORTS, Some(&cursor), Some(2), None).expect("valid");
        assert_eq!((next.integer().expect("an integer"), next.tie_text().expect("a text")), (8, "b"));
        assert!(next.text().is_err());
        assert!(PageQuery::new(SORTS, Some(&cursor), None, Some("name")).is_err());
        assert!(next.page(vec![(7, "c")], |row| (SortKey::Integer(row.0), row.1)).next_cursor.is_none());
    }

    #[test]
    fn limits_sort_fields_and_cursors_are_checked() {
        for (cursor, limit, sort, field) in [
            (None, Some(0), None, "limit"),
            (None, Some(201), None, "limit"),
            (None, None, Some("id; DROP TABLE projects"), "sort"),
            (None, None, Some("--name"), "sort"),
            (Some("x"), None, None, "cursor"),
            (Some("WzEsMiwzXQ"), None, None, "cursor"),
        ] {
            let problem = PageQuery::new(SORTS, cursor, limit, sort).expect_err("invalid");
            assert_eq!((problem.status, problem.errors[0].field.as_str()), (422, field));
        }
        assert!(PageQuery::new(SORTS, None, Some(200), Some("-name")).is_ok_and(|query| query.descending()));
    }
}
