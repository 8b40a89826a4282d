//! Reads the entries of a tar with their long names. Names and records before an entry are read here, with a limit: the
//! library would read each completely, whatever its size.

use std::io::Read;

use super::counting::Counter;
use super::{ArchiveError, MAX_PATH_BYTES, read_error, refused, text};

/// Bytes of the records before one entry.
const MAX_RECORD_BYTES: u64 = 1 << 20;

/// Attributes from the records before an entry.
#[derive(Default)]
struct Ahead {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
}

/// Calls `visit` with the name, the link's target and the content of each entry.
pub fn for_each<R: Read>(
    entries: tar::Entries<'_, R>,
    counter: &mut Counter,
    mut visit: impl FnMut(&str, Option<&str>, &mut tar::Entry<'_, R>, &mut Counter) -> Result<(), ArchiveError>,
) -> Result<(), ArchiveError> {
    let mut ahead = Ahead::default();
    for entry in entries.raw(true) {
        let mut entry = entry.map_err(read_error)?;
        let kind = entry.header().entry_type();
        if kind.is_gnu_longname() {
            counter.count_entry(0)?;
            ahead.name = Some(without_nul(record(&mut entry, MAX_PATH_BYTES as u64 + 1)?));
        } else if kind.is_gnu_longlink() {
            counter.count_entry(0)?;
            ahead.link = Some(without_nul(record(&mut entry, MAX_PATH_BYTES as u64 + 1)?));
        } else if kind.is_pax_local_extensions() {
            counter.count_entry(0)?;
            let records = record(&mut entry, MAX_RECORD_BYTES)?;
            ahead.read(&records)?;
        } else if kind.is_pax_global_extensions() {
            counter.count_entry(0)?;
            record(&mut entry, MAX_RECORD_BYTES)?;
        } else {
            let ahead = std::mem::take(&mut ahead);
            // Readers that ignore the record would see other entries than those that use it.
            if ahead.size.is_some_and(|size| size != entry.size()) {
                return Err(refused("the archive gives two different sizes for one entry"));
            }
            let name = ahead.name.unwrap_or_else(|| entry.path_bytes().into_owned());
            let link = ahead.link.or_else(|| entry.link_name_bytes().map(std::borrow::Cow::into_owned));
            let (name, link) = (text(&name)?, link.map(|link| text(&link)).transpose()?);
            counter.count_entry(name.len())?;
            counter.count_name(link.as_ref().map_or(0, String::len))?;
            visit(&name, link.as_deref(), &mut entry, counter)?;
        }
    }
    Ok(())
}

/// Reads an entry that describes the next one. Refuses it unread if it is too long.
fn record<R: Read>(entry: &mut tar::Entry<'_, R>, max_bytes: u64) -> Result<Vec<u8>, ArchiveError> {
    if entry.size() > max_bytes {
        return Err(refused(format!(
            "a name or a record in the archive has {} bytes; at most {max_bytes} are allowed",
            entry.size()
        )));
    }
    let mut content = Vec::new();
    entry.read_to_end(&mut content).map_err(read_error)?;
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
