//! Reads and checks rfw.conf and everything that it names. Each error is a sentence with file and
//! line.

use crate::config::{Config, Named, Outward};
use crate::file::{self, Access};
use crate::firewall::iptables::restore_path;
use crate::firewall::prerequisites;
use crate::http::auth::Users;
use crate::http::tls::{Acceptor, Part};
use crate::rule::net::Family;
use crate::rule::whitelist::{LineError, Whitelist};
use crate::state::StateFile;
use std::fs::{self, File};
use std::iter;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const HIDDEN: &str = "; the systemd unit reads only files that LoadCredential= names (see the \
                      comments in rfw.service); rfw.conf names them without a path";

/// What rfw starts with.
pub struct Setup {
    pub config: Config,
    pub whitelist: Whitelist,
    pub users: Users,
    /// For the outward server.
    pub acceptor: Option<Acceptor>,
    /// Whether this host can filter IPv6.
    pub ipv6: bool,
    /// Each is a sentence.
    pub warnings: Vec<String>,
}

impl Setup {
    pub fn load(file: &Path) -> Result<Setup, String> {
        let directory = file.parent().unwrap_or(Path::new("."));
        let text = file::read_text(file, Access::Readable)?;
        let mut config = Config::parse(&text, directory).map_err(|error| error.at(file))?;
        if config.credentials.is_some() {
            file::read(file, Access::Secret)?;
        }
        let source = Source(file);
        let list = &config.whitelist;
        let text = source.locate_read(list, file::read_text(&list.path, Access::Readable))?;
        let whitelist = Whitelist::parse(&text).map_err(|error| error.at(&list.path))?;
        let mut users = Users::new(config.credentials.take());
        if let Some(named) = &config.users {
            let text = source.locate_read(named, file::read_text(&named.path, Access::Secret))?;
            users.add(&text).map_err(|error| error.at(&named.path))?;
        }
        let acceptor = config.outward.as_ref().map(|outward| source.acceptor(outward));
        let acceptor = acceptor.transpose()?;
        let Config { iptables, ip6tables, ipset, .. } = &mut config;
        for program in [iptables, ip6tables].into_iter().chain(ipset) {
            program.path = find(&program.path);
        }
        let mut warnings: Vec<_> = config.warnings.iter().map(|warning| warning.at(file)).collect();
        let problem = ipv6_problem(&config.ip6tables.path);
        let ipv6 = problem.is_none();
        warnings.extend(problem.map(|problem| format!("IPv6 rules are not accepted: {problem}")));
        for (family, named) in families(&config, ipv6) {
            check_iptables(&named.path, family).map_err(|error| source.locate(named, error))?;
        }
        if let Some(ipset) = &config.ipset {
            check_program(&ipset.path).map_err(|error| source.locate(ipset, error))?;
        }
        Ok(Setup { config, whitelist, users, acceptor, ipv6, warnings })
    }
}

/// The path of rfw.conf, for errors in the files that it names.
struct Source<'a>(&'a Path);

impl Source<'_> {
    /// Adds the line of rfw.conf to an error.
    fn locate(&self, named: &Named, message: String) -> String {
        LineError { line: named.line, message }.at(self.0)
    }

    /// The same for the contents of a file that rfw.conf names, with a hint for the systemd unit.
    fn locate_read<T>(&self, named: &Named, read: Result<T, String>) -> Result<T, String> {
        read.map_err(|message| {
            let is_unit = self.0.starts_with("/run/credentials");
            let is_hidden = is_unit && File::open(&named.path).is_err();
            let hint = if is_hidden { HIDDEN } else { "" };
            self.locate(named, message + hint)
        })
    }

    fn acceptor(&self, outward: &Outward) -> Result<Acceptor, String> {
        let Outward { certfile, keyfile, clientca, tls12, .. } = outward;
        let read = |named: &Named, access| self.locate_read(named, file::read(&named.path, access));
        let chain = read(certfile, Access::Readable)?;
        let key = read(keyfile, Access::Secret)?;
        let ca = clientca.as_ref().map(|ca| read(ca, Access::Readable)).transpose()?;
        Acceptor::new(&chain, &key, ca.as_deref(), *tls12).map_err(|(part, problem)| {
            let named = match part {
                Part::Chain => certfile,
                Part::Key => keyfile,
                Part::ClientCa => clientca.as_ref().unwrap_or(certfile),
            };
            self.locate(named, format!("{} {problem}", named.path.display()))
        })
    }
}

/// Checks the state file and the extensions of iptables, which a start simply uses: for `-t`, and to
/// explain why a start failed.
pub fn check_start(file: &Path, config: &Config, ipv6: bool) -> Result<(), String> {
    let source = Source(file);
    if let Some(state) = &config.state {
        let checked = StateFile::check(&state.path);
        checked.map_err(|error| source.locate(state, error.at(&state.path)))?;
    }
    let sets = config.ipset.is_some();
    for (family, named) in families(config, ipv6) {
        let checked = prerequisites::check_extensions(&named.path, family, sets);
        checked.map_err(|error| source.locate(named, error))?;
    }
    Ok(())
}

/// The iptables of each family. If rfw.conf does not name ip6tables, rfw can do without it.
fn families(config: &Config, ipv6: bool) -> impl Iterator<Item = (Family, &Named)> {
    let Config { iptables, ip6tables, .. } = config;
    let has_ip6tables = ipv6 || ip6tables.line > 0;
    iter::once((Family::V4, iptables)).chain(has_ip6tables.then_some((Family::V6, ip6tables)))
}

fn check_iptables(path: &Path, family: Family) -> Result<(), String> {
    check_program(path)?;
    check_program(&restore_path(path))?;
    prerequisites::check_version(path, family)
}

/// The path of a program that rfw.conf names. PATH is not searched: an ordinary user may have set
/// it.
fn find(program: &Path) -> PathBuf {
    let paths = ["/sbin", "/usr/sbin"].map(|directory| Path::new(directory).join(program));
    paths.iter().find(|path| path.exists()).unwrap_or(&paths[0]).clone()
}

/// Why this host cannot filter IPv6. A kernel without it has no such file in /proc.
fn ipv6_problem(ip6tables: &Path) -> Option<String> {
    if Path::new("/proc/self/net/dev").exists() && !Path::new("/proc/self/net/if_inet6").exists() {
        return Some("this host has no IPv6".into());
    }
    match ip6tables.try_exists() {
        Ok(false) => Some(format!("{} does not exist", ip6tables.display())),
        _ => None,
    }
}

/// Checks that a file is a program; the start shows whether it works.
fn check_program(program: &Path) -> Result<(), String> {
    let name = program.display();
    let data = fs::metadata(program)
        .map_err(|error| format!("{name}: {error}; install it, or correct its path"))?;
    if !data.is_file() || data.mode() & 0o111 == 0 {
        return Err(format!("{name} is not an executable file; correct its path"));
    }
    if data.mode() & 0o022 != 0 {
        return Err(format!("{name}: other users can write to it; run chmod go-w {name}"));
    }
    Ok(())
}
