//! `#[derive(FromRow)]` of `capsule-store`.

use proc_macro::TokenStream;
use quote::quote;
use syn::{Data, DeriveInput, Error, Field, Fields, LitStr, parse_macro_input};

/// Reads each field of a struct from the column of its name, or of the name that the field's `#[column("…")]` says.
///
/// ```ignore
/// #[derive(FromRow)]
/// struct Project {
///     id: Uuid,
///     archived_at: Option<i64>,
///     #[column("wanted")]
///     desired_state: String,
/// }
/// let projects: Vec<Project> = store.read().all(unscoped!("a reason", "SELECT :columns FROM projects")).await?;
/// ```
#[proc_macro_derive(FromRow, attributes(column))]
pub fn derive_from_row(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    let Data::Struct(data) = &input.data else { return refuse(&input) };
    let Fields::Named(fields) = &data.fields else { return refuse(&input) };
    if !input.generics.params.is_empty() {
        return refuse(&input);
    }
    let names: Result<Vec<String>, Error> = fields.named.iter().map(column).collect();
    let names = match names {
        Ok(names) => names,
        Err(error) => return error.to_compile_error().into(),
    };
    let fields: Vec<_> = fields.named.iter().filter_map(|field| field.ident.as_ref()).collect();
    let columns = names.join(", ");
    let (name, indexes) = (&input.ident, 0..fields.len());
    quote! {
        impl ::capsule_store::FromRow for #name {
            const COLUMNS: &'static str = #columns;

            fn from_row(row: &::capsule_store::Row<'_>) -> ::core::result::Result<Self, ::capsule_store::DecodeError> {
                ::core::result::Result::Ok(Self { #(#fields: row.column(#names, #indexes)?),* })
            }
        }
    }
    .into()
}

/// The column that a field is read from.
fn column(field: &Field) -> Result<String, Error> {
    if let Some(attribute) = field.attrs.iter().find(|attribute| attribute.path().is_ident("column")) {
        return Ok(attribute.parse_args::<LitStr>()?.value());
    }
    Ok(field.ident.as_ref().map(|name| name.to_string().trim_start_matches("r#").to_owned()).unwrap_or_default())
}

fn refuse(input: &DeriveInput) -> TokenStream {
    Error::new_spanned(&input.ident, "a row is a struct with named fields and without parameters").to_compile_error().into()
}
