//! From the arguments and the files that they name to a job. Everything is read and checked before
//! the first byte is sent; errors are sentences.

use crate::file::{self, Access};
use crate::http::auth::Credentials;
use crate::http::body::MAX_BODY;
use crate::http::request::is_authority;
use crate::http::tls::Connector;
use crate::nearest;
use crate::rule::is_number;
use crate::rule::tag::{self, Tag};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

pub const USAGE: &str = "\
usage: rfwc [OPTION]... put PATH [--list FILE [--replace]]
       rfwc [OPTION]... delete PATH [--list FILE]
       rfwc [OPTION]... get PATH
       rfwc [OPTION]... batch FILE

Sends a request to rfw servers; PATH as in /drop/input/any/192.0.2.1?expire=1h.
batch sends each line of FILE, put PATH or delete PATH, as soon as it is read.
If FILE is -, standard input is read.

  --server URL        http[s]://HOST[:PORT], once for each server; the default
                      port is 7390, for https 7393; without this option,
                      http://127.0.0.1:7390
  --servers FILE      a list of servers, one URL per line; # starts a comment
  --list FILE         the list to send
  --tag NAME          the source of the rules: adds tag=NAME to PATH
  --replace           adds replace=true: PATH then has no other rules with the tag
  --credentials FILE  one line USER:PASSWORD, readable only by its owner (mode
                      0600); or set RFW_CREDENTIALS=USER:PASSWORD
  --cacert FILE       the CA of the servers, instead of the public ones
  --cert FILE         the certificate of this client, and
  --key FILE          its key, for servers that require one
  --timeout SECONDS   time limit for each server and request, retries
                      included, default 30
  -V, --version       print the version
  -h, --help          print this help

Standard output has one line per server, URL: STATUS RESULT or URL: ERROR; for
get, the body: unchanged from one server, each line after its URL: from several;
for batch, only the lines that failed.
Standard error has the URLs of the servers that failed, one per line, as
--servers reads them, unless a terminal shows them already.
Exit status: 0 all servers succeeded, 1 some failed, 2 wrong usage.
";

const DEFAULT_SERVER: &str = "http://127.0.0.1:7390";
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

pub enum Command {
    Help,
    Version,
    Send(Fleet, Job),
    /// A source of jobs, one per line, and what is added to the query of each.
    Batch(Fleet, Box<dyn Read>, Vec<String>),
}

/// The servers, and what all requests to them share.
pub struct Fleet {
    pub servers: Vec<Server>,
    pub credentials: Option<Credentials>,
    pub connector: Connector,
    pub timeout: Duration,
}

/// One request.
#[derive(Debug)]
pub struct Job {
    pub method: &'static str,
    /// The path with its query, as it is sent.
    pub path: String,
    /// The body, of which all threads send the same copy.
    pub list: Vec<u8>,
}

#[derive(Debug)]
pub struct Server {
    /// The URL as given.
    pub name: String,
    pub tls: bool,
    /// A name or an address, without brackets.
    pub host: String,
    pub port: u16,
}

/// Parses the arguments. `credentials` are those of the environment.
pub fn parse(
    mut args: impl Iterator<Item = String>,
    credentials: Option<String>,
) -> Result<Command, String> {
    let mut arguments = Arguments { credentials, ..Arguments::default() };
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value"));
        match arg.as_str() {
            "-h" | "--help" => return Ok(Command::Help),
            "-V" | "--version" => return Ok(Command::Version),
            "--server" => arguments.servers.push(Server::parse(&value()?)?),
            "--servers" => arguments.servers.extend(read_servers(&value()?)?),
            "--list" if arguments.list.is_some() => {
                return Err("write --list once; cat joins files".into());
            }
            "--list" => arguments.list = Some(value()?),
            "--tag" => arguments.query.push(tag(&value()?)?),
            "--replace" => arguments.query.push("replace=true".into()),
            "--credentials" => {
                let text = file::read_text(Path::new(&value()?), Access::Secret)?;
                arguments.credentials = Some(text);
            }
            "--cacert" => arguments.ca = Some(read(&value()?)?),
            "--cert" => arguments.chain = Some(read(&value()?)?),
            "--key" => arguments.key = Some(file::read(Path::new(&value()?), Access::Secret)?),
            "--timeout" => arguments.timeout = Some(seconds(&value()?)?),
            option if option.starts_with('-') && option != "-" => {
                let hint = nearest::option_hint(option, USAGE);
                return Err(format!("unknown option {option}{hint}; rfwc -h shows all options"));
            }
            operand => arguments.operands.push(operand.into()),
        }
    }
    arguments.command()
}

#[derive(Default)]
struct Arguments {
    servers: Vec<Server>,
    list: Option<String>,
    /// What is added to the query of every path.
    query: Vec<String>,
    credentials: Option<String>,
    ca: Option<Vec<u8>>,
    chain: Option<Vec<u8>>,
    key: Option<Vec<u8>>,
    timeout: Option<Duration>,
    operands: Vec<String>,
}

impl Arguments {
    fn command(mut self) -> Result<Command, String> {
        if self.servers.is_empty() {
            self.servers.push(Server::parse(DEFAULT_SERVER)?);
        }
        let pair = match (&self.chain, &self.key) {
            (Some(chain), Some(key)) => Some((&**chain, &**key)),
            (None, None) => None,
            _ => return Err("--cert and --key must be given together".into()),
        };
        let fleet = Fleet {
            servers: self.servers,
            connector: Connector::new(self.ca.as_deref(), pair)?,
            credentials: self.credentials.as_deref().map(user_and_password).transpose()?,
            timeout: self.timeout.unwrap_or(DEFAULT_TIMEOUT),
        };
        if self.list.is_none() && self.query.iter().any(|part| part == "replace=true") {
            return Err("--replace needs --list FILE".into());
        }
        if let [command, file] = &*self.operands
            && command.eq_ignore_ascii_case("batch")
        {
            return match self.list {
                Some(_) => Err("batch takes no --list".into()),
                None => Ok(Command::Batch(fleet, open(file)?, self.query)),
            };
        }
        let mut job = Job::parse(&self.operands, &self.query)?;
        match self.list {
            Some(_) if job.method == "GET" => return Err("get takes no --list".into()),
            Some(file) => {
                job.list = read(&file)?;
                // Without a body, the path itself may name a rule.
                if job.list.is_empty() {
                    return Err(format!("{file} is empty"));
                }
            }
            None => {}
        }
        Ok(Command::Send(fleet, job))
    }
}

impl Job {
    /// Parses a method and a path, and appends `query` to the path's query.
    pub fn parse(words: &[impl AsRef<str>], query: &[String]) -> Result<Job, String> {
        let [method, path] = words else {
            return Err(
                "write put, delete or get and a path, or batch and a file; rfwc -h shows the usage"
                    .into(),
            );
        };
        let mut methods = ["PUT", "DELETE", "GET"].into_iter();
        let method = methods.find(|known| known.eq_ignore_ascii_case(method.as_ref()));
        let method = method.ok_or("write put, delete or get before the path")?;
        let mut path = path.as_ref().to_string();
        for pair in query {
            path = format!("{path}{}{pair}", if path.contains('?') { '&' } else { '?' });
        }
        match path.starts_with('/') && path.bytes().all(|byte| byte.is_ascii_graphic()) {
            true => Ok(Job { method, path, list: Vec::new() }),
            false => Err("the path must start with / and be printable ASCII without spaces; \
                          escape the rest, such as %20 for a space"
                .into()),
        }
    }
}

/// A tag or `*`, so that nothing else gets into the query.
fn tag(name: &str) -> Result<String, String> {
    match name == "*" || Tag::parse(name).is_some() {
        true => Ok(format!("tag={name}")),
        false => Err(format!("--tag {name:?}: write {}", tag::FORM)),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|n| is_number(text) && (1..=1_000_000).contains(n));
    let invalid = format!("--timeout {text}: write 1 to 1000000 seconds");
    seconds.map(Duration::from_secs).ok_or(invalid)
}

impl Server {
    /// `http[s]://HOST[:PORT][/]`
    fn parse(url: &str) -> Result<Server, String> {
        if url.contains('@') {
            return Err("a URL must not contain user and password; use --credentials".into());
        }
        let invalid =
            || format!("'{}' is not a server; write http[s]://HOST[:PORT]", url.escape_debug());
        let (scheme, rest) = url.split_once("://").ok_or_else(invalid)?;
        let (tls, port) = match scheme {
            "http" => (false, 7390),
            "https" => (true, 7393),
            _ => return Err(invalid()),
        };
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        if !is_authority(authority) {
            return Err(invalid());
        }
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, digits)) if !digits.ends_with(']') => (host, digits.parse().ok()),
            _ => (authority, Some(port)),
        };
        let port = port.filter(|port| *port > 0).ok_or_else(invalid)?;
        let host = host.trim_matches(['[', ']']).into();
        Ok(Server { name: url.into(), tls, host, port })
    }
}

fn read_servers(file: &str) -> Result<Vec<Server>, String> {
    let bytes = read(file)?;
    let mut servers = Vec::new();
    for (number, line) in (1..).zip(String::from_utf8_lossy(&bytes).lines()) {
        let url = line.split('#').next().unwrap_or_default().trim();
        if !url.is_empty() {
            let server = Server::parse(url).map_err(|error| format!("{file}:{number}: {error}"));
            servers.push(server?);
        }
    }
    match servers.is_empty() {
        true => Err(format!("{file} contains no server; write one URL per line")),
        false => Ok(servers),
    }
}

/// Opens a file; `-` is standard input.
fn open(file: &str) -> Result<Box<dyn Read>, String> {
    match file {
        "-" => Ok(Box::new(io::stdin())),
        _ => Ok(Box::new(File::open(file).map_err(|error| unreadable(file, &error))?)),
    }
}

/// No error shows the text.
fn user_and_password(text: &str) -> Result<Credentials, String> {
    let (user, password) = text.trim_end_matches(['\r', '\n']).split_once(':').unwrap_or_default();
    Credentials::new(user, password).ok_or("the credentials must be one line, USER:PASSWORD".into())
}

/// Reads a whole file, or enough of it for rfw to refuse it as too long for a list.
fn read(file: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let read = open(file)?.take(MAX_BODY.saturating_add(1)).read_to_end(&mut bytes);
    read.map(|_| bytes).map_err(|error| unreadable(file, &error))
}

fn unreadable(file: &str, error: &io::Error) -> String {
    format!("{file}: cannot read it: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers() {
        let table = [
            ("http://a", "http a 7390"),
            ("https://a/", "https a 7393"),
            ("http://127.0.0.1:80", "http 127.0.0.1 80"),
            ("https://[2001:db8::1]", "https 2001:db8::1 7393"),
            ("https://[2001:db8::1]:65535/", "https 2001:db8::1 65535"),
            ("https://a.example:1", "https a.example 1"),
        ];
        for (url, expected) in table {
            let Server { name, tls, host, port } = Server::parse(url).unwrap();
            let scheme = if tls { "https" } else { "http" };
            assert_eq!((&*name, &*format!("{scheme} {host} {port}")), (url, expected));
        }
        let invalid = [
            "",
            "a",
            "a:7390",
            "127.0.0.1",
            "//a",
            "ftp://a",
            "HTTP://a",
            "http:/a",
            "http://",
            "http:///",
            "http://:80",
            "http://a:",
            "http://a:0",
            "http://a:65536",
            "http://a:x",
            "http://a:+1",
            "http://a//",
            "http://a/x",
            "http://a?x",
            "http://a#x",
            "http://a b",
            "http://2001:db8::1",
            "http://[2001:db8::1",
            "http://[a]",
            "http://[::1]x",
            "http://\u{e9}",
            "http://a\n",
        ];
        for url in invalid {
            let error = Server::parse(url).unwrap_err();
            assert!(error.ends_with("is not a server; write http[s]://HOST[:PORT]"), "{error}");
        }
        for url in ["http://u:pw@a", "https://u@a", "u:pw@a"] {
            let error = Server::parse(url).unwrap_err();
            assert!(error.ends_with("use --credentials") && !error.contains("pw"), "{error}");
        }
    }

    /// The meaning of a command line, or the error.
    fn read(line: &str, variable: Option<&str>) -> String {
        let args = line.split_whitespace().map(String::from);
        match parse(args, variable.map(String::from)) {
            Err(error) => error,
            Ok(Command::Help) => "help".into(),
            Ok(Command::Version) => "version".into(),
            Ok(Command::Batch(_, _, query)) => format!("batch {}", query.join(" ")),
            Ok(Command::Send(fleet, job)) => {
                let names: Vec<_> = fleet.servers.iter().map(|server| &*server.name).collect();
                let field = fleet.credentials.map(|c| c.field()).unwrap_or_default();
                let seconds = fleet.timeout.as_secs();
                let line =
                    format!("{} {} {} {seconds} {field}", job.method, job.path, names.join(" "));
                line.trim_end().into()
            }
        }
    }

    #[test]
    fn command_lines() {
        let table = [
            ("put /x", "PUT /x http://127.0.0.1:7390 30"),
            ("Delete /x?y=%20", "DELETE /x?y=%20 http://127.0.0.1:7390 30"),
            (
                "--server http://a get --timeout 7 /x --server http://b",
                "GET /x http://a http://b 7",
            ),
            ("get /x --timeout 1000000", "GET /x http://127.0.0.1:7390 1000000"),
            ("get /x --timeout 1000001", "--timeout 1000001: write 1 to 1000000 seconds"),
            ("get /x --timeout +1", "--timeout +1: write 1 to 1000000 seconds"),
            ("get /x --timeout 0", "--timeout 0: write 1 to 1000000 seconds"),
            ("--nope -h", "unknown option --nope; rfwc -h shows all options"),
            ("--server a", "'a' is not a server; write http[s]://HOST[:PORT]"),
            (
                "--credential x",
                "unknown option --credential (did you mean --credentials?); rfwc -h shows all options",
            ),
            ("nope -h", "help"),
            ("get --version", "version"),
            ("get /x --cert Cargo.toml", "--cert and --key must be given together"),
            ("get /x --key /proc/self/environ", "--cert and --key must be given together"),
            ("get /x --list Cargo.toml", "get takes no --list"),
            ("put /x --tag feed", "PUT /x?tag=feed http://127.0.0.1:7390 30"),
            ("delete /x?y=1 --tag *", "DELETE /x?y=1&tag=* http://127.0.0.1:7390 30"),
            (
                "put /x --replace --list Cargo.toml --tag a.b_c-9",
                "PUT /x?replace=true&tag=a.b_c-9 http://127.0.0.1:7390 30",
            ),
            ("batch -", "batch "),
            ("Batch Cargo.toml --tag peer", "batch tag=peer"),
            ("batch - --list Cargo.toml", "batch takes no --list"),
            ("put /x --list a --list b", "write --list once; cat joins files"),
            ("batch - --replace", "--replace needs --list FILE"),
            ("put /x --replace --tag a", "--replace needs --list FILE"),
            (
                "batch",
                "write put, delete or get and a path, or batch and a file; rfwc -h shows the usage",
            ),
            (
                "batch - --tag a&expire=1",
                "--tag \"a&expire=1\": write 1 to 20 of a-z, 0-9, '.', '_' and '-', the first a letter or digit",
            ),
        ];
        for (line, expected) in table {
            assert_eq!(read(line, None), expected, "{line}");
        }
        for path in ["x", "", "/\u{1}", "/\u{7f}", "/\u{e9}", "/a b"] {
            assert!(Job::parse(&["get", path], &[]).is_err(), "{path:?}");
        }
    }

    #[test]
    fn credentials() {
        let right = "GET /x http://127.0.0.1:7390 30 Authorization: Basic YTpiOmM=";
        for text in ["a:b:c", "a:b:c\n", "a:b:c\r\n"] {
            assert_eq!(read("get /x", Some(text)), right);
        }
        for text in ["", "a", "a:", ":b", "a:b\n\nc", "a:b\u{0}", "\na:b"] {
            let error = "the credentials must be one line, USER:PASSWORD";
            assert_eq!(read("get /x", Some(text)), error, "{text:?}");
        }
    }
}
