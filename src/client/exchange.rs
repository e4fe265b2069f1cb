//! One request to one server, retried until it gets a response or the time is up, and the
//! connection, which the next request can use.

use super::options::{Fleet, Job, Server};
use crate::clock;
use crate::http::api_error::ApiError;
use crate::http::body;
use crate::http::deadline::DeadlineSocket;
use crate::http::request::MAX_HEAD;
use crate::http::response_head::Head;
use crate::http::stream::is_timeout;
use crate::http::tls;
use std::cell::Cell;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

/// The pause before the first retry; each further one is twice as long, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(4);
/// The time limit for connecting to one address of a host.
const CONNECT_TIME: Duration = Duration::from_secs(5);
/// The time limit for the response to a change of one rule: then the connection is considered dead
/// (the address of this host has changed, for example), and the next one has time left. A request
/// that has not reached rfw by then never will: 5 s to connect, 5 s without a slot, 9 s for the head.
const CHANGE_TIME: Duration = Duration::from_secs(20);
/// How long a connection is reused: rfw closes it when it has been idle for nine seconds.
const MAX_AGE: Duration = Duration::from_secs(5);
/// The longest body of a response in bytes, except that of a `get`.
const MAX_RESPONSE: usize = 64 * 1024;

/// Receives the body of a `get`.
pub type Sink<'a> = dyn FnMut(&[u8]) -> io::Result<()> + 'a;

/// A connection to a server, plain or TLS.
trait Wire: Read + Write {}
impl<T: Read + Write> Wire for T {}

/// A connection for successive requests.
pub struct Connection {
    wire: BufReader<Box<dyn Wire>>,
    /// That of the current request.
    deadline: Rc<Cell<Instant>>,
    /// When it is too old for another request.
    until: Instant,
}

/// Why one attempt failed.
pub struct Failure {
    pub message: String,
    /// The shortest time after which a retry may succeed; `None` if none can.
    pub retry_after: Option<Duration>,
}

fn permanent(message: impl Into<String>) -> Failure {
    Failure { message: message.into(), retry_after: None }
}

fn transient(message: impl Into<String>) -> Failure {
    Failure { message: message.into(), retry_after: Some(Duration::ZERO) }
}

#[derive(Clone, Copy)]
pub struct Request<'a> {
    pub fleet: &'a Fleet,
    pub server: &'a Server,
    pub job: &'a Job,
}

/// Sends a request, over the kept connection if possible, and retries it. Returns a summary of the
/// response, which is empty if the sink received it, or the failure of the last attempt.
pub fn send(
    request: Request<'_>,
    kept: &mut Option<Connection>,
    sink: &mut Sink<'_>,
) -> Result<String, Failure> {
    let deadline = clock::after(request.fleet.timeout);
    let mut pause = FIRST_PAUSE;
    loop {
        let failure = match attempt(request, deadline, kept, sink) {
            Ok(summary) => return Ok(summary),
            Err(failure) => failure,
        };
        let wait = failure.retry_after.map(|shortest| shortest.max(pause));
        let left = deadline.saturating_duration_since(Instant::now());
        match wait.filter(|wait| *wait < left) {
            Some(wait) => thread::sleep(wait),
            None => return Err(failure),
        }
        pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
    }
}

fn attempt(
    request: Request<'_>,
    deadline: Instant,
    kept: &mut Option<Connection>,
    sink: &mut Sink<'_>,
) -> Result<String, Failure> {
    let limit = if is_single(request.job) { clock::after(CHANGE_TIME) } else { deadline };
    let deadline = deadline.min(limit);
    let mut connection = match kept.take().filter(|kept| Instant::now() < kept.until) {
        Some(connection) => connection,
        None => connect(request, deadline)?,
    };
    connection.deadline.set(deadline);
    let wire = &mut connection.wire;
    let sent = write_request(wire.get_mut(), request);
    // A server that refuses a list may respond and close before it has received all of it.
    let head = read_head(wire).map_err(|error| match (tls::describe_error(&error), sent) {
        (None, Err(unsent)) => connection_failure(&unsent),
        _ => connection_failure(&error),
    })?;
    let invalid = "the response is not HTTP/1.1, or does not state its length";
    let head = Head::parse(&head).ok_or_else(|| permanent(invalid))?;
    if head.status == 200 && request.job.method == "GET" {
        let each = |bytes: &[u8]| sink(bytes).map_err(|error| permanent(error.to_string()));
        let read = body::read(wire, head.body, u64::MAX, each);
        // Output cannot be taken back, so there is no retry.
        return read.map(|()| String::new()).map_err(|failure| permanent(failure.message));
    }
    let result = read_result(&head, wire);
    *kept = Some(connection).filter(|_| head.keep_alive && result.is_ok());
    result
}

/// Whether it is a change of one rule, unlike `DELETE /list?tag=NAME`, which may take rfw 30 s.
fn is_single(job: &Job) -> bool {
    job.method != "GET" && job.list.is_empty() && !job.path.starts_with("/list")
}

/// Reads the body of a response that contains a result or an error.
fn read_result(head: &Head, link: &mut impl BufRead) -> Result<String, Failure> {
    let mut text = Vec::new();
    body::read(link, head.body, u64::MAX, |bytes| {
        text.extend(bytes);
        match text.len() > MAX_RESPONSE {
            true => Err(permanent("the response is too long")),
            false => Ok(()),
        }
    })?;
    let text = String::from_utf8_lossy(&text);
    let summary = format!("{} {}", head.status, summarize(&text));
    let summary = summary.trim_end();
    match head.status {
        200 if text.starts_with(RESULT) => Ok(summary.into()),
        200 => Err(permanent("200, but the response is not from rfw")),
        401 => Err(permanent(format!("{summary} Pass the right ones with --credentials."))),
        429 | 503 => Err(Failure { message: summary.into(), retry_after: Some(head.retry_after) }),
        _ => Err(permanent(summary)),
    }
}

fn connect(request: Request<'_>, deadline: Instant) -> Result<Connection, Failure> {
    let Request { fleet, server, .. } = request;
    let addresses = (&*server.host, server.port).to_socket_addrs();
    let unresolved = |error| transient(format!("cannot resolve the host name: {error}"));
    let addresses = addresses.map_err(unresolved)?;
    let mut failure = transient("the host has no address");
    for address in addresses {
        if fleet.credentials.is_some() && !server.tls && !address.ip().to_canonical().is_loopback()
        {
            return Err(permanent("user and password are sent only over https; write https://"));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let time = left.clamp(Duration::from_millis(1), CONNECT_TIME);
        let opened = TcpStream::connect_timeout(&address, time);
        match opened.and_then(|stream| stream.set_nodelay(true).map(|()| stream)) {
            Err(error) => failure = transient(format!("cannot connect to {address}: {error}")),
            Ok(stream) => {
                let deadline = Rc::new(Cell::new(deadline));
                let socket = DeadlineSocket { stream: stream.into(), deadline: deadline.clone() };
                let wire: Box<dyn Wire> = match server.tls {
                    false => Box::new(socket),
                    true => {
                        let link = fleet.connector.link(&server.host, socket);
                        Box::new(link.map_err(|error| permanent(error.to_string()))?)
                    }
                };
                let (wire, until) = (BufReader::new(wire), clock::after(MAX_AGE));
                return Ok(Connection { wire, deadline, until });
            }
        }
    }
    Err(failure)
}

fn write_request(
    link: &mut impl Write,
    Request { fleet, server, job }: Request<'_>,
) -> io::Result<()> {
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

/// Reads a head, or the first line if it does not start with `HTTP/`.
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

/// rfw's responses begin with one of these.
const RESULT: &str = "{\"result\":\"";
const ERROR: &str = "{\"error\":\"";

/// A response of rfw in one line: `inserted`, `applied: inserted 3, refreshed 0`, or an error:
/// `whitelisted: SENTENCE`, followed by the invalid lines of a list. A note comes at the end.
fn summarize(body: &str) -> String {
    let begin = |start| body.strip_prefix(start).and_then(|rest: &str| rest.split_once('"'));
    let Some((word, rest)) = begin(RESULT).or_else(|| begin(ERROR)) else {
        return String::new();
    };
    let (details, lines) = match rest.strip_prefix(",\"message\":\"") {
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
    let parts = [details + &lines, note];
    let parts = parts.iter().filter(|part| !part.is_empty()).map(|part| format!(": {part}"));
    word.to_string() + &parts.collect::<String>()
}

/// A JSON string up to its closing quote, and the text after it. Control characters stay escaped.
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

/// Why a connection failed. Only TLS errors are permanent.
fn connection_failure(error: &io::Error) -> Failure {
    match (tls::describe_error(error), error.kind()) {
        (Some(description), _) => permanent(description),
        (_, ErrorKind::UnexpectedEof) => transient("the server closed without a response"),
        _ if is_timeout(error) => transient("no response in time"),
        _ => transient(error.to_string()),
    }
}

/// Why the body of a response cannot be read.
impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Failure {
        match error {
            body::SHORT => transient("the response is incomplete"),
            body::SLOW => transient("no complete response in time"),
            _ => permanent("the response has malformed chunks"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries() {
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
            assert_eq!(summarize(body), expected, "{body}");
            assert_eq!(summarize(&format!("{body}\n")).trim_end(), expected, "{body}");
        }
    }

    #[test]
    fn changes_of_one_rule() {
        let table = [
            ("put", "/drop/input/any/1.2.3.4", "", true),
            ("delete", "/drop/input/any/1.2.3.4?tag=*", "", true),
            ("put", "/drop/input/any", "1.2.3.4", false),
            ("delete", "/list?tag=feed", "", false),
            ("delete", "/list/input?tag=feed", "", false),
            ("get", "/list", "", false),
        ];
        for (method, path, list, expected) in table {
            let job = Job { list: list.into(), ..Job::parse(&[method, path], &[]).unwrap() };
            assert_eq!(is_single(&job), expected, "{method} {path} {list}");
        }
    }

    #[test]
    fn only_the_head_is_read() {
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
