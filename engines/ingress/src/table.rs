//! The routing table: which host leads where.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// All routes at one moment. Replaced as a whole; a higher revision is newer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    pub revision: u64,
    /// Hosts below it are applications; it itself, and any address, is the gateway.
    pub base_domain: String,
    /// The gateway's name where it is another than the base domain; or empty.
    #[serde(default)]
    pub public_host: String,
    /// The networks of proxies before the ingress whose `X-Forwarded-For` and `X-Forwarded-Proto` are believed.
    #[serde(default)]
    pub trusted_proxies: Vec<IpNet>,
    pub routes: BTreeMap<String, Route>,
}

/// Where the requests for one host go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    pub state: State,
    #[serde(default)]
    pub targets: Vec<Target>,
    /// Set when the host is a site of plain files.
    #[serde(default)]
    pub site: Option<Site>,
}

/// What the application behind a host is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Ready,
    Starting,
    Crashed,
    /// It runs, but no process of it takes requests.
    Worker,
    Stopped,
}

/// An instance that takes requests.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Target {
    /// The instance's name, under which its shim answers.
    pub instance: String,
    /// The port on the instance's own loopback.
    pub port: u16,
    /// Its share of the requests; 0 is none, but it can be probed.
    pub weight: u32,
}

/// A folder of files to serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Site {
    pub root: PathBuf,
    /// Whether unknown paths get `index.html`: a single-page application.
    pub single_page: bool,
}

impl Table {
    /// Reads the table kept at `file`; an empty one where there is none, or it is damaged.
    pub fn load(file: &Path) -> Self {
        let kept = std::fs::read(file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        kept.unwrap_or_default()
    }

    /// Keeps the table at `file`: whole, or as it was before.
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
    fn a_kept_table_is_read_again_and_a_damaged_one_is_empty() {
        let directory = tempfile::tempdir().expect("tempdir");
        let file = directory.path().join("table.json");
        let route = Route { state: State::Starting, targets: Vec::new(), site: None };
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
