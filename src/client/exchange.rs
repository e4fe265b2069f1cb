//! One request to one server, again and again until it is answered or the time
//! is over; and the connection, which the next one can use.

use super::options::{Fleet, Job, Server};
use crate::http::api_error::ApiError;
use crate::http::body;
use crate::http::deadline::DeadlineSocket;
use crate::http::request::MAX_HEAD;
use crate::http::response_head::Head;
use crate::http::stream::is_timeout;
use crate::http::tls;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

/// The pause before the second try; each one after it is twice as long, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(4);
/// How long each address of a host may take to be reached.
const CONNECT_TIME: Duration = Duration::from_secs(5);
/// How long the answer to a change of one rule may take: rfw needs 30 s at most. After that the
/// connection is taken for dead, whatever time is left.
const CHANGE_TIME: Duration = Duration::from_secs(35);
/// How long a connection is used: rfw closes it once it has been idle for nine seconds.
const MAX_AGE: Duration = Duration::from_secs(5);
/// The longest answer in bytes, but for what `get` brings.
const MAX_ANSWER: usize = 64 * 1024;

/// Where the body goes that a `get` brings.
pub type Sink<'a> = dyn FnMut(&[u8]) -> io::Result<()> + 'a;

/// A connection to a server, plain or TLS.
trait Wire: Read + Write {}
impl Wire for DeadlineSocket {}
impl Wire for tls::Link {}

/// A connection for one request after the other.
pub struct Connection {
    wire: BufReader<Box<dyn Wire>>,
    /// When it is too old for another request.
    until: Instant,
}

impl Connection {
    /// All its waits end at the deadline, so more than half of the time must be left for a request.
    fn new(wire: impl Wire + 'static, deadline: Instant) -> Connection {
        let now = Instant::now();
        let half = deadline.saturating_duration_since(now).checked_div(2).unwrap_or_default();
        let age = MAX_AGE.min(half);
        Connection {
            wire: BufReader::new(Box::new(wire)),
            until: now.checked_add(age).unwrap_or(now),
        }
    }
}

/// Why one try failed.
pub struct Failure {
    pub words: String,
    /// It may do better after so long, or a pause, whichever is longer.
    pub again: Option<Duration>,
}

fn for_good(words: impl Into<String>) -> Failure {
    Failure { words: words.into(), again: None }
}

fn for_now(words: impl Into<String>) -> Failure {
    Failure { words: words.into(), again: Some(Duration::ZERO) }
}

/// A job for one server.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    pub fleet: &'a Fleet,
    pub server: &'a Server,
    pub job: &'a Job,
}

/// Sends a request, on the connection that is kept if possible. Returns the words of the
/// result, which are empty where the sink has got it; as an error if the server did not do it.
pub fn ask(
    request: Request<'_>,
    kept: &mut Option<Connection>,
    sink: &mut Sink<'_>,
) -> Result<String, Failure> {
    let started = Instant::now();
    let deadline = started.checked_add(request.fleet.timeout).unwrap_or(started);
    let mut pause = FIRST_PAUSE;
    loop {
        let failure = match exchange(request, deadline, kept, sink) {
            Ok(words) => return Ok(words),
            Err(failure) => failure,
        };
        let wait = failure.again.map(|least| least.max(pause));
        let left = deadline.saturating_duration_since(Instant::now());
        match wait.filter(|wait| *wait < left) {
            Some(wait) => thread::sleep(wait),
            None => return Err(failure),
        }
        pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
    }
}

fn exchange(
    request: Request<'_>,
    deadline: Instant,
    kept: &mut Option<Connection>,
    sink: &mut Sink<'_>,
) -> Result<String, Failure> {
    let is_single = request.job.list.is_empty() && request.job.method != "GET";
    let soon = Instant::now().checked_add(CHANGE_TIME).filter(|_| is_single);
    let mut connection = match kept.take().filter(|kept| Instant::now() < kept.until) {
        Some(connection) => connection,
        None => connect(request, deadline.min(soon.unwrap_or(deadline)))?,
    };
    let wire = &mut connection.wire;
    let sent = send(wire.get_mut(), request);
    // Who refuses a list may say why before it is there, and close.
    let head = read_head(wire).map_err(|error| match (tls::complaint(&error), sent) {
        (None, Err(unsent)) => fault(&unsent),
        _ => fault(&error),
    })?;
    let wrong = "the answer is not HTTP/1.1, or does not say how long it is";
    let head = Head::parse(&head).ok_or_else(|| for_good(wrong))?;
    if head.status == 200 && request.job.method == "GET" {
        let each = |bytes: &[u8]| sink(bytes).map_err(|error| for_good(error.to_string()));
        let read = body::read(wire, head.body, u64::MAX, each);
        // What is written cannot be taken back.
        return read.map(|()| String::new()).map_err(|failure| for_good(failure.words));
    }
    let answer = judge(&head, wire);
    *kept = Some(connection).filter(|_| head.keep_alive && answer.is_ok());
    answer
}

/// Reads an answer that has a result or an error.
fn judge(head: &Head, link: &mut impl BufRead) -> Result<String, Failure> {
    let mut text = Vec::new();
    body::read(link, head.body, u64::MAX, |bytes| {
        text.extend(bytes);
        match text.len() > MAX_ANSWER {
            true => Err(for_good("the answer is too long")),
            false => Ok(()),
        }
    })?;
    let text = String::from_utf8_lossy(&text);
    let words = format!("{} {}", head.status, words(&text));
    let words = words.trim_end();
    match head.status {
        200 if text.starts_with(RESULT) => Ok(words.into()),
        200 => Err(for_good("200, but this is no answer of rfw's")),
        401 => Err(for_good(format!("{words} Give them with --credentials."))),
        503 => Err(Failure { words: words.into(), again: Some(head.retry_after) }),
        _ => Err(for_good(words)),
    }
}

fn connect(request: Request<'_>, deadline: Instant) -> Result<Connection, Failure> {
    let Request { fleet, server, .. } = request;
    let addresses = (&*server.host, server.port).to_socket_addrs();
    let addresses = addresses.map_err(|error| for_now(format!("cannot find the host: {error}")))?;
    let mut failure = for_now("the host has no address");
    for address in addresses {
        if fleet.credentials.is_some() && !server.tls && !address.ip().to_canonical().is_loopback()
        {
            return Err(for_good("user and password go over https only; write https://"));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let time = left.clamp(Duration::from_millis(1), CONNECT_TIME);
        let opened = TcpStream::connect_timeout(&address, time).and_then(|stream| {
            stream.set_nodelay(true).map(|()| DeadlineSocket { stream: stream.into(), deadline })
        });
        match opened {
            Err(error) => failure = for_now(format!("cannot connect to {address}: {error}")),
            Ok(socket) if !server.tls => return Ok(Connection::new(socket, deadline)),
            Ok(socket) => {
                let link = fleet.connector.link(&server.host, socket);
                let link = link.map_err(|error| for_good(error.to_string()))?;
                return Ok(Connection::new(link, deadline));
            }
        }
    }
    Err(failure)
}

fn send(link: &mut impl Write, Request { fleet, server, job }: Request<'_>) -> io::Result<()> {
    let (Job { method, path, list }, Server { host, port, .. }) = (job, server);
    let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
    let authorization = fleet.credentials.as_ref().map(|credentials| credentials.field());
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {}\r\n{}\r\n",
        list.len(),
        authorization.unwrap_or_default()
    );
    link.write_all(head.as_bytes())?;
    link.write_all(list)?;
    link.flush()
}

/// Reads as far as it is a head.
fn read_head(link: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    while head.is_empty() || head.starts_with(b"HTTP/") && !head.ends_with(b"\r\n\r\n") {
        let room = MAX_HEAD.saturating_sub(head.len()) as u64;
        if room == 0 {
            break;
        }
        if link.take(room).read_until(b'\n', &mut head)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(head)
}

/// rfw begins its answers with one of these.
const RESULT: &str = "{\"result\":\"";
const ERROR: &str = "{\"error\":\"";

/// An answer of rfw's for a line: `inserted`, `applied: inserted 3, refreshed 0`,
/// `whitelisted: SENTENCE`, and behind the sentence what lines of a list are wrong. A note follows.
fn words(body: &str) -> String {
    let begin = |start| body.strip_prefix(start).and_then(|rest: &str| rest.split_once('"'));
    let Some((word, rest)) = begin(RESULT).or_else(|| begin(ERROR)) else {
        return String::new();
    };
    let (more, lines) = match rest.strip_prefix(",\"message\":\"") {
        Some(message) => unescape(message),
        None if word == "applied" => {
            let counts = rest.split(",\"whitelisted\":").next().unwrap_or_default();
            let counts = counts.trim_start_matches(',').replace('"', "");
            (counts.replace(':', " ").replace(',', ", "), "")
        }
        None => Default::default(),
    };
    let lines = lines.trim_end().trim_end_matches('}').replacen(",\"lines\":", " ", 1);
    let note = rest.split_once(",\"note\":\"").map_or(String::new(), |(_, note)| unescape(note).0);
    let parts = [more + &lines, note];
    let parts = parts.iter().filter(|part| !part.is_empty()).map(|part| format!(": {part}"));
    word.to_string() + &parts.collect::<String>()
}

/// A string of JSON's up to its closing quote, and what is behind it. Control
/// characters stay escaped.
fn unescape(text: &str) -> (String, &str) {
    let mut out = String::new();
    let mut chars = text.chars();
    loop {
        match chars.next() {
            None | Some('"') => return (out, chars.as_str()),
            Some('\\') => match chars.next() {
                Some(c @ ('"' | '\\')) => out.push(c),
                other => out.extend(['\\'].into_iter().chain(other)),
            },
            Some(c) => out.push(c),
        }
    }
}

/// What went wrong with the connection: that may pass, but wrong TLS does not.
fn fault(error: &io::Error) -> Failure {
    match (tls::complaint(error), error.kind()) {
        (Some(complaint), _) => for_good(complaint),
        (_, ErrorKind::UnexpectedEof) => for_now("the server closed without an answer"),
        _ if is_timeout(error) => for_now("no answer in time"),
        _ => for_now(error.to_string()),
    }
}

/// What is wrong with the body of an answer.
impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Failure {
        match error {
            body::SHORT => for_now("the answer broke off"),
            body::SLOW => for_now("no whole answer in time"),
            _ => for_good("the chunks of the answer are malformed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_in_words() {
        let table = [
            (r#"{"result":"inserted","rule":{"chain":"INPUT"},"expires":null}"#, "inserted"),
            (
                r#"{"result":"applied","inserted":3,"exists":0,"whitelisted_count":1,"whitelisted":["::1"]}"#,
                "applied: inserted 3, exists 0, whitelisted_count 1",
            ),
            (r#"{"result":"inserted","expires":null,"note":"No \"x\"."}"#, "inserted: No \"x\"."),
            (
                r#"{"result":"applied","inserted":3,"wrong_count":1,"whitelisted":[],"wrong":[],"note":"N."}"#,
                "applied: inserted 3, wrong_count 1: N.",
            ),
            (r#"{"error":"whitelisted","message":"It overlaps."}"#, "whitelisted: It overlaps."),
            (r#"{"error":"e","message":"a \"b\" \\n \u000a\"c"}"#, r#"e: a "b" \n \u000a"c"#),
            (
                r#"{"error":"bad_list","message":"1.","lines":[{"line":2,"message":"x\"y"}]}"#,
                r#"bad_list: 1. [{"line":2,"message":"x\"y"}]"#,
            ),
            (r#"{"error":"e"}"#, "e"),
            (r#"{"error":"e","message":"cut"#, "e: cut"),
            (r#"{"error":"e","message":"cut\"#, "e: cut\\"),
            (r#"{"error":"cut"#, ""),
            (r#"{"message":"x","error":"e"}"#, ""),
            ("<html>", ""),
            ("", ""),
        ];
        for (body, expected) in table {
            assert_eq!(words(body), expected, "{body}");
            assert_eq!(words(&format!("{body}\n")).trim_end(), expected, "{body}");
        }
    }

    #[test]
    fn heads_end_where_they_end() {
        let long = format!("HTTP/1.1 200 {}", "x".repeat(MAX_HEAD));
        let table = [
            ("HTTP/1.1 200\r\nX: y\r\n\r\nbody", "HTTP/1.1 200\r\nX: y\r\n\r\n"),
            ("SSH-2.0\r\nmore", "SSH-2.0\r\n"),
            ("HTTP/", "end"),
            ("HTTP/1.1 200\r\nX: y\r\n", "end"),
            ("", "end"),
            (&long, &long[..MAX_HEAD]),
        ];
        for (bytes, head) in table {
            let read = read_head(&mut bytes.as_bytes());
            let read = read.map_or("end".into(), |head| String::from_utf8(head).unwrap());
            assert_eq!(read, head, "{bytes:.30}");
        }
    }
}
