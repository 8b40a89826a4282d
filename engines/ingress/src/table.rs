//! The routing table: maps hosts to endpoints and sites.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// All routes. The table is replaced as a whole; a higher revision is newer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    pub revision: u64,
    /// Applications are on subdomains of this domain. The domain itself, and any IP address, is the gateway.
    pub base_domain: String,
    /// Another host of the gateway, or empty.
    #[serde(default)]
    pub public_host: String,
    /// The networks of proxies in front of the ingress whose `X-Forwarded-For` and `X-Forwarded-Proto` are trusted.
    #[serde(default)]
    pub trusted_proxies: Vec<IpNet>,
    /// The routes by host.
    pub routes: BTreeMap<String, Route>,
}

/// Where the requests for one host go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    pub state: State,
    #[serde(default, rename = "targets")]
    pub endpoints: Vec<Endpoint>,
    /// Set if the host is a site of static files.
    #[serde(default)]
    pub site: Option<Site>,
}

/// The state of the application behind a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Ready,
    Starting,
    Crashed,
    /// It runs, but has no process that serves requests.
    Worker,
    Stopped,
}

/// An instance that serves requests.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Endpoint {
    /// The name of the instance, which is also the name of its shim's socket.
    pub instance: String,
    /// The port on the instance's own loopback interface.
    pub port: u16,
    /// Its share of the requests. With 0 it gets none, but can be probed.
    pub weight: u32,
}

/// A site of static files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Site {
    /// The directory of the files.
    pub root: PathBuf,
    /// Whether unknown paths are answered with `index.html`, as a single-page application needs.
    pub single_page: bool,
}

impl Table {
    /// Reads the table from `file`. Returns an empty table if the file is missing or damaged.
    pub fn load(file: &Path) -> Self {
        let saved = std::fs::read(file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        saved.unwrap_or_default()
    }

    /// Replaces `file` with this table atomically.
    pub fn save(&self, file: &Path) -> std::io::Result<()> {
        let new = file.with_extension("new");
        let mut written = std::fs::File::create(&new)?;
        std::io::Write::write_all(&mut written, &serde_json::to_vec(self)?)?;
        written.sync_all()?;
        std::fs::rename(new, file)
    }
}

#[cfg(test)]
mod tests {
    use super::{Route, State, Table};

    #[test]
    fn a_saved_table_is_loaded_and_a_damaged_one_is_empty() {
        let directory = tempfile::tempdir().expect("tempdir");
        let file = directory.path().join("table.json");
        let route = Route { state: State::Starting, endpoints: Vec::new(), site: None };
        let table = Table {
            revision: 7,
            base_domain: "localhost".into(),
            routes: [("a.localhost".into(), route)].into(),
            ..Table::default()
        };
        table.save(&file).expect("saves");
        assert_eq!(Table::load(&file), table);
        std::fs::write(&file, b"{\"revision\": 8, ").expect("damages");
        assert_eq!(Table::load(&file), Table::default());
    }
}
