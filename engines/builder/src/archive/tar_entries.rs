//! The entries of a tar with their whole names. Names and records that stand before an entry are read here,
//! within bounds: the library would read each as a whole, whatever its size.

use std::io::Read;

use super::counting::Counter;
use super::{ArchiveError, MOST_PATH, refused, text, unread};

/// Bytes of the records that stand before one entry.
const MOST_RECORDS: u64 = 1 << 20;

/// What stands before an entry and belongs to it.
#[derive(Default)]
struct Ahead {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
}

/// Calls `take` with the name, the link's target and the content of each entry.
pub fn for_each<R: Read>(
    entries: tar::Entries<'_, R>,
    counter: &mut Counter,
    mut take: impl FnMut(&str, Option<&str>, &mut tar::Entry<'_, R>, &mut Counter) -> Result<(), ArchiveError>,
) -> Result<(), ArchiveError> {
    let mut ahead = Ahead::default();
    for entry in entries.raw(true) {
        let mut entry = entry.map_err(unread)?;
        let kind = entry.header().entry_type();
        if kind.is_gnu_longname() {
            counter.entry(0)?;
            ahead.name = Some(without_nul(record(&mut entry, MOST_PATH as u64 + 1)?));
        } else if kind.is_gnu_longlink() {
            counter.entry(0)?;
            ahead.link = Some(without_nul(record(&mut entry, MOST_PATH as u64 + 1)?));
        } else if kind.is_pax_local_extensions() {
            counter.entry(0)?;
            let records = record(&mut entry, MOST_RECORDS)?;
            ahead.read(&records)?;
        } else if kind.is_pax_global_extensions() {
            counter.entry(0)?;
            record(&mut entry, MOST_RECORDS)?;
        } else {
            let ahead = std::mem::take(&mut ahead);
            // What a reader that knows the record would take for content, another would take for entries.
            if ahead.size.is_some_and(|size| size != entry.size()) {
                return Err(refused("the archive gives two different sizes for one entry"));
            }
            let name = ahead.name.unwrap_or_else(|| entry.path_bytes().into_owned());
            let link = ahead.link.or_else(|| entry.link_name_bytes().map(std::borrow::Cow::into_owned));
            let (name, link) = (text(&name)?, link.map(|link| text(&link)).transpose()?);
            counter.entry(name.len())?;
            counter.name(link.as_ref().map_or(0, String::len))?;
            take(&name, link.as_deref(), &mut entry, counter)?;
        }
    }
    Ok(())
}

/// The content of an entry that describes the next one, refused before it is read if it is too long.
fn record<R: Read>(entry: &mut tar::Entry<'_, R>, most: u64) -> Result<Vec<u8>, ArchiveError> {
    if entry.size() > most {
        return Err(refused(format!("a name or a record in the archive has {} bytes; at most {most} are allowed", entry.size())));
    }
    let mut content = Vec::new();
    entry.read_to_end(&mut content).map_err(unread)?;
    Ok(content)
}

fn without_nul(mut name: Vec<u8>) -> Vec<u8> {
    if name.last() == Some(&0) {
        name.pop();
    }
    name
}

impl Ahead {
    /// Reads records of POSIX' pax format: `length key=value`, each with the end of a line behind it. The length
    /// counts all of that; a value may hold any bytes.
    fn read(&mut self, mut records: &[u8]) -> Result<(), ArchiveError> {
        let malformed = || refused("the archive has a malformed pax record");
        while !records.is_empty() && records[0] != 0 {
            let space = records.iter().take(20).position(|byte| *byte == b' ').ok_or_else(malformed)?;
            let length: usize =
                std::str::from_utf8(&records[..space]).ok().and_then(|text| text.parse().ok()).ok_or_else(malformed)?;
            let whole =
                records.get(..length).filter(|whole| whole.len() > space + 1 && whole.ends_with(b"\n")).ok_or_else(malformed)?;
            let pair = &whole[space + 1..length - 1];
            let equals = pair.iter().position(|byte| *byte == b'=').ok_or_else(malformed)?;
            let (key, value) = (&pair[..equals], &pair[equals + 1..]);
            match key {
                b"path" => self.name = Some(value.to_vec()),
                b"linkpath" => self.link = Some(value.to_vec()),
                b"size" => {
                    let size = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
                    self.size = Some(size.ok_or_else(malformed)?);
                }
                _ => {}
            }
            records = &records[length..];
        }
        Ok(())
    }
}
