//! The text of rfw.conf to a [`Config`]; every error names its line.
//!
//! ```text
//! file    = *( blank / comment / "[config]" / flag / setting )
//! comment = ( "#" / ";" ) text      ; on a line of its own
//! flag    = key
//! setting = key "=" value
//! ```

use crate::http::auth::Credentials;
use crate::nearest;
use crate::rule::interval::{self, LONGEST_IN_SET};
use crate::rule::is_number;
use crate::rule::whitelist::LineError;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

const FLAGS: &str = "outward.server outward.server.tls12 local.server \
                     local.server.authentication non.restful";
const SETTINGS: &str = "outward.server.port outward.server.ip outward.server.certfile \
                        outward.server.keyfile outward.server.clientca local.server.port \
                        auth.username auth.password auth.file default.expire whitelist.file \
                        iptables.path ip6tables.path ipset.path ipset.maxelem state.file";

/// The keys whose values may contain anything.
const LITERAL: [&str; 2] = ["auth.username", "auth.password"];

/// The HTTPS server for remote clients.
pub struct Outward {
    pub ip: IpAddr,
    pub port: u16,
    pub certfile: Named,
    pub keyfile: Named,
    /// The CA that must have signed the certificates of clients.
    pub clientca: Option<Named>,
    pub tls12: bool,
}

/// The plain server on the loopback addresses.
pub struct Local {
    pub port: u16,
    pub authentication: bool,
}

/// The content of rfw.conf. Relative paths start at its directory.
pub struct Config {
    pub outward: Option<Outward>,
    pub local: Option<Local>,
    pub credentials: Option<Credentials>,
    /// The file that names more users.
    pub users: Option<Named>,
    pub non_restful: bool,
    /// Seconds; 0 means permanent.
    pub default_expire: u64,
    pub whitelist: Named,
    /// An absolute path or a bare name, like `ip6tables`.
    pub iptables: Named,
    pub ip6tables: Named,
    /// Names the program if addresses are kept in sets.
    pub ipset: Option<Named>,
    /// The maximum number of addresses in a set.
    pub maxelem: usize,
    /// The file that preserves the list across reboots.
    pub state: Option<Named>,
    /// Probable mistakes.
    pub warnings: Vec<LineError>,
}

/// A path, and the line of rfw.conf that names it; 0 for a default.
pub struct Named {
    pub path: PathBuf,
    pub line: usize,
}

fn error<T>(line: usize, message: impl Into<String>) -> Result<T, LineError> {
    Err(LineError { line, message: message.into() })
}

impl Config {
    /// Parses the text of a file in `directory`.
    pub fn parse(text: &str, directory: &Path) -> Result<Config, LineError> {
        let entries = Entries::parse(text, directory)?;
        let (outward, local) = (entries.outward()?, entries.local()?);
        entries.check_servers(outward.as_ref(), local.as_ref())?;
        let count =
            |value: &str| value.parse().ok().filter(|count: &u32| is_number(value) && *count > 0);
        let maxelem =
            entries.get("ipset.maxelem", 1_048_576, "a number, 1 to 4294967295", count)?;
        let ipset =
            entries.line("ipset.path").map(|_| entries.program("ipset.path", PathBuf::new()));
        let iptables = entries.program("iptables.path", "/sbin/iptables".into())?;
        let default_expire = entries.get("default.expire", 0, interval::FORM, interval::parse)?;
        if ipset.is_some() && default_expire > u64::from(LONGEST_IN_SET) {
            return error(
                entries.line("default.expire").unwrap_or(0),
                format!("with ipset.path, default.expire may be at most {LONGEST_IN_SET} s"),
            );
        }
        Ok(Config {
            credentials: entries.credentials(local.as_ref())?,
            users: entries.optional("auth.file")?,
            outward,
            local,
            non_restful: entries.line("non.restful").is_some(),
            default_expire,
            ipset: ipset.transpose()?,
            maxelem: usize::try_from(maxelem).unwrap_or(usize::MAX),
            state: entries.optional("state.file")?,
            whitelist: entries.named("whitelist.file", 0)?,
            ip6tables: entries.program("ip6tables.path", ip6tables_for(&iptables.path))?,
            iptables,
            warnings: entries.warnings(),
        })
    }

    /// One line for each feature: ON with its details, or OFF.
    pub fn summary(&self, users: usize, ipv6: bool) -> String {
        let show = |named: &Named| named.path.display().to_string();
        let outward = self.outward.as_ref().map(|outward| {
            let address = SocketAddr::new(outward.ip, outward.port);
            let versions = if outward.tls12 { "TLS 1.2 and 1.3" } else { "TLS 1.3" };
            let ca = outward.clientca.as_ref();
            let ca = ca.map_or("no client CA".into(), |ca| format!("client CA {}", show(ca)));
            format!("https://{address}, {versions}, {ca}")
        });
        let local = self.local.as_ref().map(|Local { port, authentication }| {
            let with = if *authentication { "with" } else { "without" };
            format!("http://localhost:{port}, {with} authentication")
        });
        let sets = |ipset| format!("{}, at most {} addresses each", show(ipset), self.maxelem);
        let expire = Some(self.default_expire).filter(|seconds| *seconds > 0);
        let lines = [
            ("outward.server", outward),
            ("local.server", local),
            ("sets", self.ipset.as_ref().map(sets)),
            ("state file", self.state.as_ref().map(show)),
            ("users", Some(users).filter(|users| *users > 0).map(|users| users.to_string())),
            ("default.expire", expire.map(|seconds| format!("{seconds} s"))),
            ("non.restful", self.non_restful.then(|| "GET can change rules".into())),
        ];
        let lines = lines.map(|(name, on)| match on {
            Some(details) => format!("{name}: ON, {details}\n"),
            None => format!("{name}: OFF\n"),
        });
        let iptables = show(&self.iptables);
        let ip6tables = if ipv6 { show(&self.ip6tables) } else { "OFF".into() };
        format!("{}iptables: {iptables}\nip6tables: {ip6tables}\n", lines.concat())
    }
}

/// The ip6tables of the same variant: `/sbin/ip6tables-nft` for `/sbin/iptables-nft`.
fn ip6tables_for(iptables: &Path) -> PathBuf {
    let name = iptables.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let variant = name.strip_prefix("iptables").unwrap_or_default();
    iptables.with_file_name(format!("ip6tables{variant}"))
}

struct Entries<'a> {
    /// Each key with its line and, unless it is a flag, its value.
    keys: HashMap<&'a str, (usize, &'a str)>,
    directory: &'a Path,
}

impl<'a> Entries<'a> {
    fn parse(text: &'a str, directory: &'a Path) -> Result<Entries<'a>, LineError> {
        let mut keys = HashMap::new();
        let mut section = false;
        for (number, line) in (1..).zip(text.lines().map(str::trim)) {
            if line.is_empty() || line.starts_with(['#', ';']) {
                continue;
            }
            if line.starts_with('[') {
                if section || line != "[config]" {
                    return error(number, "the only section is [config], which must occur once");
                }
                section = true;
                continue;
            }
            if !section {
                return error(number, "[config] is missing; write it on a line before this one");
            }
            let (key, value) =
                entry(line).map_err(|message| LineError { line: number, message })?;
            if let Some((first, _)) = keys.insert(key, (number, value)) {
                return error(number, format!("{key} is already set in line {first}"));
            }
        }
        Ok(Entries { keys, directory })
    }

    fn outward(&self) -> Result<Option<Outward>, LineError> {
        let form = "an address to listen on, such as 0.0.0.0 or ::, but not fe80::";
        let any = IpAddr::from(Ipv4Addr::UNSPECIFIED);
        let parse = |value: &str| match value.parse() {
            // No socket can be bound to it without its interface.
            Ok(IpAddr::V6(ip)) if ip.is_unicast_link_local() => None,
            parsed => parsed.ok(),
        };
        let ip = self.get("outward.server.ip", any, form, parse)?;
        let port = self.port("outward.server.port", 7393)?;
        let Some(line) = self.line("outward.server") else { return Ok(None) };
        Ok(Some(Outward {
            ip,
            port,
            certfile: self.named("outward.server.certfile", line)?,
            keyfile: self.named("outward.server.keyfile", line)?,
            clientca: self.optional("outward.server.clientca")?,
            tls12: self.line("outward.server.tls12").is_some(),
        }))
    }

    fn local(&self) -> Result<Option<Local>, LineError> {
        let port = self.port("local.server.port", 7390)?;
        let authentication = self.line("local.server.authentication").is_some();
        Ok(self.line("local.server").map(|_| Local { port, authentication }))
    }

    fn check_servers(
        &self,
        outward: Option<&Outward>,
        local: Option<&Local>,
    ) -> Result<(), LineError> {
        if outward.is_none() && local.is_none() {
            return error(0, "no server is enabled; add a line outward.server or local.server");
        }
        if let (Some(outward), Some(local)) = (outward, local)
            && (outward.ip.is_unspecified() || outward.ip.is_loopback())
            && outward.port == local.port
        {
            let line = self.line("local.server").unwrap_or(0);
            return error(line, format!("both servers use port {}", local.port));
        }
        Ok(())
    }

    fn line(&self, key: &str) -> Option<usize> {
        self.keys.get(key).map(|(line, _)| *line)
    }

    fn get<T>(
        &self,
        key: &str,
        default: T,
        form: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<T, LineError> {
        let Some((line, value)) = self.keys.get(key) else { return Ok(default) };
        match parse(value) {
            Some(parsed) => Ok(parsed),
            None => error(*line, format!("{key} = {value} is not valid; write {form}")),
        }
    }

    fn port(&self, key: &str, default: u16) -> Result<u16, LineError> {
        let parse = |value: &str| value.parse().ok().filter(|port| is_number(value) && *port > 0);
        self.get(key, default, "a TCP port, 1 to 65535", parse)
    }

    /// An absolute path or, as in the rfw.conf of 0.2.2, a bare name.
    fn program(&self, key: &str, default: PathBuf) -> Result<Named, LineError> {
        let form = "an absolute path, or the name of a program in /sbin or /usr/sbin";
        let parse = |value: &str| {
            let path = PathBuf::from(value);
            let is_bare = path.file_name() == Some(path.as_os_str());
            Some(path).filter(|path| is_bare || path.is_absolute())
        };
        let path = self.get(key, default, form, parse)?;
        Ok(Named { path, line: self.line(key).unwrap_or(0) })
    }

    fn optional(&self, key: &str) -> Result<Option<Named>, LineError> {
        self.line(key).map(|line| self.named(key, line)).transpose()
    }

    /// A path that `line` requires.
    fn named(&self, key: &str, line: usize) -> Result<Named, LineError> {
        let path = self.directory.join(self.required(key, line)?);
        Ok(Named { path, line: self.line(key).unwrap_or(0) })
    }

    /// A value that `line` requires.
    fn required(&self, key: &str, line: usize) -> Result<&'a str, LineError> {
        match self.keys.get(key) {
            Some((_, value)) => Ok(value),
            None => error(line, format!("{key} is missing; add a line {key} = ...")),
        }
    }

    /// The user in rfw.conf. A server with authentication requires one, unless there is an
    /// auth.file.
    fn credentials(&self, local: Option<&Local>) -> Result<Option<Credentials>, LineError> {
        let local = self.line("local.server").filter(|_| local.is_some_and(|l| l.authentication));
        let required_by = self.line("outward.server").or(local);
        let set = ["auth.username", "auth.password"].iter().any(|key| self.line(key).is_some());
        if !set && (required_by.is_none() || self.line("auth.file").is_some()) {
            return Ok(None);
        }
        let line = required_by.unwrap_or(0);
        let user = self.required("auth.username", line)?;
        let password = self.required("auth.password", line)?;
        match Credentials::new(user, password) {
            Some(credentials) => Ok(Some(credentials)),
            None => error(
                self.line("auth.username").unwrap_or(0),
                "auth.username contains a colon, or it or auth.password contains a control character",
            ),
        }
    }

    /// Warns of quotes and comments in a user name or password. They may be intended; 0.2.2 took
    /// them literally, too.
    fn warnings(&self) -> Vec<LineError> {
        let warning = |key: &&str| {
            let (line, value) = *self.keys.get(*key)?;
            let is_quoted = |quote| value.strip_prefix(quote).is_some_and(|v| v.ends_with(quote));
            let part = match ['"', '\''].into_iter().any(is_quoted) {
                true => "its quotes",
                false if has_comment(value) => "what looks like a comment",
                false => return None,
            };
            let message = format!(
                "{key} is taken literally, including {part}; correct it if that is not intended"
            );
            Some(LineError { line, message })
        };
        LITERAL.iter().filter_map(warning).collect()
    }
}

/// Parses a line that sets a key. No error shows a password.
fn entry(line: &str) -> Result<(&str, &str), String> {
    let (key, value) = match line.split_once('=') {
        None => (line, None),
        Some((key, value)) => (key.trim_end(), Some(value.trim_start())),
    };
    let name = key.split([':', ' ', '\t']).next().unwrap_or_default();
    if has_comment(line) && !LITERAL.contains(&key) {
        return Err("a comment must be on a line of its own".into());
    }
    let is_in = |keys: &str| keys.split_whitespace().any(|known| known == name);
    match (is_in(FLAGS), is_in(SETTINGS), value) {
        (true, _, None) if name == key => Ok((key, "")),
        (true, ..) => {
            Err(format!("{name} is a flag: it takes no value; to turn it off, remove the line"))
        }
        (_, true, _) if name != key => Err(format!("write it with =, as in {name} = ...")),
        (_, true, None | Some("")) => {
            Err(format!("{key} has no value; write one, or remove the line"))
        }
        (_, true, Some(value)) => Ok((key, value)),
        _ => {
            let keys = FLAGS.split_whitespace().chain(SETTINGS.split_whitespace());
            let hint = nearest::hint(name, keys);
            Err(format!("unknown key '{}'{hint}", name.escape_debug()))
        }
    }
}

fn has_comment(text: &str) -> bool {
    text.split_whitespace().skip(1).any(|word| word.starts_with(['#', ';']))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = "[config]\nlocal.server\nwhitelist.file = white.list\n";
    const OUTWARD: &str = "outward.server\noutward.server.certfile = c\n\
                           outward.server.keyfile = /k\nauth.username = u\nauth.password = p = q\n";

    fn parse(text: &str) -> Result<Config, LineError> {
        Config::parse(text, Path::new("/etc/rfw"))
    }

    #[test]
    fn defaults() {
        let config = parse(LEAST).unwrap();
        let local = config.local.unwrap();
        assert_eq!((local.port, local.authentication), (7390, false));
        assert!(config.outward.is_none() && config.credentials.is_none() && !config.non_restful);
        assert_eq!(config.default_expire, 0);
        assert_eq!(config.whitelist.path, Path::new("/etc/rfw/white.list"));
        assert_eq!(config.iptables.path, Path::new("/sbin/iptables"));
        assert_eq!(config.ip6tables.path, Path::new("/sbin/ip6tables"));

        let outward = parse(&format!("{LEAST}{OUTWARD}")).unwrap().outward.unwrap();
        assert_eq!((outward.ip.to_string().as_str(), outward.port), ("0.0.0.0", 7393));
        assert_eq!(outward.certfile.path, Path::new("/etc/rfw/c"));
        assert_eq!(outward.keyfile.path, Path::new("/k"));
        assert!(!outward.tls12 && outward.clientca.is_none());
    }

    #[test]
    fn every_key() {
        let text = format!(
            "# comment\n\n; comment\n{LEAST}{OUTWARD}  outward.server.ip=::\noutward.server.port = 1\n\
             outward.server.tls12\r\nlocal.server.port\t=\t65535\nlocal.server.authentication\n\
             non.restful\ndefault.expire = 10m\niptables.path = /usr/sbin/iptables-nft\n"
        );
        let config = parse(&text).unwrap();
        let (outward, local) = (config.outward.unwrap(), config.local.unwrap());
        assert_eq!((outward.ip.to_string().as_str(), outward.port, outward.tls12), ("::", 1, true));
        assert_eq!((local.port, local.authentication), (65535, true));
        assert_eq!((config.non_restful, config.default_expire), (true, 600));
        assert_eq!(config.ip6tables.path, Path::new("/usr/sbin/ip6tables-nft"));
        let text = format!("{LEAST}iptables.path = /x/fake\n");
        assert_eq!(parse(&text).unwrap().ip6tables.path, Path::new("/x/ip6tables"));
        let config = parse(&format!("{LEAST}iptables.path = iptables-nft\n")).unwrap();
        assert_eq!(config.iptables.path, Path::new("iptables-nft"));
        assert_eq!(config.ip6tables.path, Path::new("ip6tables-nft"));
        let text = format!("{LEAST}ip6tables.path = /y/ip6tables\n");
        assert_eq!(parse(&text).unwrap().ip6tables.path, Path::new("/y/ip6tables"));

        let text = format!("{LEAST}ipset.path = /s\nipset.maxelem = 1\ndefault.expire = 2147483");
        let config = parse(&text).unwrap();
        let ipset = config.ipset.unwrap();
        assert_eq!((ipset.path.as_path(), ipset.line), (Path::new("/s"), 4));
        assert_eq!((config.maxelem, config.default_expire), (1, 2_147_483));
        // Without sets, no expiry is too long.
        assert!(parse(&format!("{LEAST}default.expire = 25d")).is_ok());
        // One port on two addresses.
        let text = format!(
            "{LEAST}{OUTWARD}outward.server.port = 7390\noutward.server.ip = 192.0.2.1\n\
             outward.server.clientca = ca"
        );
        let outward = parse(&text).unwrap().outward.unwrap();
        assert_eq!(outward.clientca.unwrap().path, Path::new("/etc/rfw/ca"));
        // A user without authentication is allowed.
        assert!(parse(&format!("{LEAST}auth.username = a\nauth.password = b")).is_ok());
        // A users file suffices, and may be combined with a user in rfw.conf.
        let keys = "local.server.authentication\nauth.file = users";
        let config = parse(&format!("{LEAST}{keys}")).unwrap();
        let users = config.users.unwrap();
        assert!(config.credentials.is_none());
        assert_eq!((users.path.as_path(), users.line), (Path::new("/etc/rfw/users"), 5));
        let config = parse(&format!("{LEAST}{OUTWARD}auth.file = users")).unwrap();
        assert!(config.credentials.is_some() && config.users.is_some());
    }

    /// The line that names a file, for messages about the file.
    #[test]
    fn lines_that_name_files() {
        let config = parse(LEAST).unwrap();
        let lines = [&config.whitelist, &config.iptables, &config.ip6tables].map(|n| n.line);
        assert_eq!(lines, [3, 0, 0]);
        let text = format!("{LEAST}{OUTWARD}iptables.path = /a\nip6tables.path = /b\n");
        let config = parse(&text).unwrap();
        let outward = config.outward.unwrap();
        let lines = [&outward.certfile, &outward.keyfile, &config.iptables, &config.ip6tables];
        assert_eq!(lines.map(|named| named.line), [5, 6, 9, 10]);
    }

    #[test]
    fn probable_mistakes() {
        let table = [
            ("p", ""),
            ("\"p", ""),
            ("\"", ""),
            ("#p", ""),
            ("p#;", ""),
            ("\"p\"", "its quotes"),
            ("''", "its quotes"),
            ("p # q", "what looks like a comment"),
            ("p ;", "what looks like a comment"),
        ];
        for (value, part) in table {
            let text = format!("{LEAST}auth.username = {value}\nauth.password = {value}");
            let warnings = parse(&text).unwrap().warnings;
            let lines: Vec<_> = warnings.iter().map(|warning| warning.line).collect();
            assert_eq!(lines, if part.is_empty() { &[][..] } else { &[4, 5] }, "{value}");
            assert!(warnings.iter().all(|warning| warning.message.contains(part)), "{value}");
        }
    }

    #[test]
    fn summaries() {
        let off = "outward.server: OFF\nlocal.server: ON, http://localhost:7390, without authentication\n\
                   sets: OFF\nstate file: OFF\nusers: OFF\ndefault.expire: OFF\n\
                   non.restful: OFF\niptables: /sbin/iptables\nip6tables: /sbin/ip6tables\n";
        assert_eq!(parse(LEAST).unwrap().summary(0, true), off);
        assert!(parse(LEAST).unwrap().summary(0, false).ends_with("\nip6tables: OFF\n"));
        let text = format!(
            "[config]\nwhitelist.file = w\nnon.restful\n{OUTWARD}outward.server.tls12\n\
            outward.server.ip = ::\noutward.server.clientca = ca\nipset.path = /s\n\
            state.file = /state\ndefault.expire = 1h"
        );
        let on = "outward.server: ON, https://[::]:7393, TLS 1.2 and 1.3, client CA /etc/rfw/ca\n\
                  local.server: OFF\nsets: ON, /s, at most 1048576 addresses each\n\
                  state file: ON, /state\nusers: ON, 3\ndefault.expire: ON, 3600 s\n\
                  non.restful: ON, GET can change rules\n";
        assert!(parse(&text).unwrap().summary(3, true).starts_with(on));
        let text = format!("{LEAST}{OUTWARD}local.server.authentication");
        let summary = parse(&text).unwrap().summary(1, true);
        let lines: Vec<_> = summary.lines().take(2).collect();
        let on = [
            "outward.server: ON, https://0.0.0.0:7393, TLS 1.3, no client CA",
            "local.server: ON, http://localhost:7390, with authentication",
        ];
        assert_eq!(lines, on);
    }

    #[test]
    fn invalid_files() {
        // Each after the three lines of LEAST.
        let table = [
            ("colour = red", 4, "unknown key 'colour'"),
            ("local.servr", 4, "'local.servr' (did you mean local.server?)"),
            ("Iptables_Path = /x", 4, " (did you mean iptables.path?)"),
            ("auth.pasword: s3cret", 4, "'auth.pasword' (did you mean auth.password?)"),
            ("auth.password: s3=cret", 4, "write it with =, as in auth.password = ..."),
            ("default.expire 10m", 4, "with =, as in default.expire"),
            ("local.server: yes", 4, "local.server is a flag"),
            ("non.restful # x", 4, "on a line of its own"),
            ("default.expire = 10m\t; x", 4, "on a line of its own"),
            ("auth.file = users # x", 4, "on a line of its own"),
            ("default.expire = 3651d", 4, "at most 3650d"),
            ("[config]", 4, "once"),
            ("whitelist.file = b", 4, "already set in line 3"),
            ("non.restful\nnon.restful", 5, "already set in line 4"),
            ("non.restful = yes", 4, "no value"),
            ("non.restful =", 4, "no value"),
            ("default.expire", 4, "no value"),
            ("auth.username =", 4, "no value"),
            ("default.expire = soon", 4, "s, m, h or d"),
            ("local.server.port = 0", 4, "65535"),
            ("local.server.port = 65536", 4, "65535"),
            ("local.server.port = +80", 4, "65535"),
            ("outward.server.ip = example.com", 4, "listen"),
            ("outward.server.port = 0", 4, "65535"),
            (
                "outward.server\noutward.server.port = 7390\noutward.server.certfile = c\n\
              outward.server.keyfile = k",
                2,
                "both servers",
            ),
            ("ipset.maxelem = 0", 4, "4294967295"),
            ("ipset.maxelem = +1", 4, "4294967295"),
            ("ipset.path = ./ipset", 4, "absolute"),
            ("default.expire = 2147484\nipset.path = /s", 4, "at most 2147483 s"),
            ("iptables.path = sbin/iptables", 4, "absolute"),
            ("ip6tables.path = ./x", 4, "absolute"),
            ("outward.server", 4, "outward.server.certfile is missing"),
            ("local.server.authentication", 2, "auth.username is missing"),
            ("auth.username = a", 0, "auth.password is missing"),
            ("auth.username = a:b\nauth.password = c", 4, "colon"),
            ("auth.file =", 4, "no value"),
            ("auth.file = u\nauth.username = a", 0, "auth.password is missing"),
        ];
        for (lines, line, part) in table {
            let error = parse(&format!("{LEAST}{lines}\n")).err().unwrap();
            assert_eq!(error.line, line, "{lines}: {}", error.message);
            assert!(error.message.contains(part), "{lines}: {}", error.message);
        }
        let whole_files = [
            ("", 0, "no server"),
            ("local.server\n", 1, "[config] is missing"),
            ("[other]\nlocal.server\n", 1, "only section"),
            ("[config]\nlocal.server\n", 0, "whitelist.file is missing"),
            ("[config]\nwhitelist.file = w\n", 0, "no server"),
            ("[config]\noutward.server.ip = localhost\noutward.server\n", 2, "listen"),
        ];
        for (text, line, part) in whole_files {
            let error = parse(text).err().unwrap();
            assert_eq!(error.line, line, "{text}: {}", error.message);
            assert!(error.message.contains(part), "{text}: {}", error.message);
        }
    }

    /// `rfw -t` accepted it, but no start could listen on it.
    #[test]
    fn a_link_local_address_to_listen_on_is_refused() {
        for (ip, is_valid) in [("fe80::1", false), ("febf::1", false), ("fec0::1", true)] {
            let parsed = parse(&format!("{LEAST}outward.server.ip = {ip}\n"));
            let message = parsed.err().map(|error| error.message);
            assert_eq!(message.is_none(), is_valid, "{ip}: {message:?}");
        }
    }
}
