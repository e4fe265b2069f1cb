//! Every error of the API: its status, error code and message.

use super::json;
use crate::rule::interval::{self, LONGEST_IN_SET};
use crate::rule::list::{Invalid, ListError, MAX_ENTRIES, MAX_LINE};
use crate::rule::net::Net;
use crate::rule::tag::{self, Tag};
use crate::rule::whitelist::Conflict;
use crate::rule::{RuleError, WIDEST_V4, WIDEST_V6, widest};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

/// How many characters of a client's text a message quotes.
const MAX_SHOWN: usize = 80;

/// Why a request is refused. This is the only place where reasons become status
/// codes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ApiError {
    /// An error of HTTP itself: status and message.
    Http(u16, &'static str),
    Unauthorized,
    /// Too many wrong credentials from this address; how long it must wait.
    TooManyGuesses(Duration),
    /// The user may make changes only with these tags.
    Forbidden(Vec<Tag>),
    /// The path supports only these methods.
    Method(&'static str),
    Rule(RuleError),
    /// A parameter that is unknown, given twice, or has an invalid value.
    Query(String),
    Tag(String),
    Expire(String),
    /// An interval longer than a set can keep an address.
    LongExpire,
    List(ListError),
    /// A set is full: what to do.
    SetFull(&'static str),
    /// Another limit is reached: which one, and what to do.
    Full(&'static str),
    /// The state file cannot be written: why.
    State(String),
    /// The change overlaps a protected block.
    Whitelisted(Conflict),
    /// An IPv6 rule on a host without IPv6.
    NoIpv6,
    /// The kernel rejected the rule; the error message of iptables.
    Iptables(String),
    /// A temporary failure: why.
    Busy(String),
}

impl ApiError {
    /// Status, error code and message.
    pub fn describe(&self) -> (u16, &'static str, String) {
        match self {
            ApiError::Http(status, message) => http(*status, *message),
            ApiError::Unauthorized => {
                http(401, "Send the user name and password of rfw.conf or auth.file.")
            }
            ApiError::TooManyGuesses(_) => http(429, "Too many wrong credentials; wait a minute."),
            ApiError::Forbidden(tags) => {
                let tags: Vec<_> = tags.iter().map(|tag| format!("tag={}", tag.name())).collect();
                let message = match &*tags.join(" or ") {
                    "" => "This user may send GET only.".into(),
                    tags => format!("This user may send GET, and changes with {tags}."),
                };
                http(403, message)
            }
            ApiError::Rule(RuleError::Unknown) => {
                http(404, "No such action or chain; GET / shows all paths.")
            }
            ApiError::Method(allow) => http(405, format!("This path supports only {allow}.")),
            ApiError::Rule(error) => describe_rule_error(error),
            ApiError::Query(message) => (400, "bad_query", message.clone()),
            ApiError::Tag(text) => {
                (400, "bad_tag", format!("{} is not a tag; write {}.", quoted(text), tag::FORM))
            }
            ApiError::Expire(text) => {
                let write = interval::FORM;
                let message = format!("{} is not an interval; write {write}.", quoted(text));
                (400, "bad_expire", message)
            }
            ApiError::LongExpire => {
                let limit = format!(
                    "In a set, an address expires after at most {LONGEST_IN_SET} s (24 days)"
                );
                (400, "bad_expire", format!("{limit}; 0 means never."))
            }
            ApiError::List(error) => describe_list_error(error),
            ApiError::SetFull(sentence) => (507, "set_full", not_applied(sentence)),
            ApiError::Full(sentence) => http(507, not_applied(sentence)),
            ApiError::State(sentence) => (507, "state_failed", not_applied(sentence)),
            ApiError::Whitelisted(conflict) => {
                let message = match conflict {
                    Conflict::Whitelisted(net) if net.addr().is_loopback() => {
                        format!("This overlaps {net}, which is always whitelisted.")
                    }
                    Conflict::Whitelisted(net) => {
                        format!(
                            "This overlaps {net} of the whitelist; edit white.list to change that."
                        )
                    }
                    Conflict::Own(net) => format!("This overlaps {net}, this host's own address."),
                };
                (409, "whitelisted", message)
            }
            ApiError::NoIpv6 => {
                (400, "bad_address", "This host does not filter IPv6; send IPv4 addresses.".into())
            }
            ApiError::Iptables(message) => (500, "iptables_failed", message.clone()),
            ApiError::Busy(reason) => (503, "busy", format!("{reason} Try again in a moment.")),
        }
    }

    /// Appends a sentence, if any, to the message of a program, which need not end with a period.
    pub fn with_note(mut self, note: &str) -> ApiError {
        if let ApiError::Iptables(text) | ApiError::Busy(text) = &mut self
            && !note.is_empty()
        {
            *text = format!("{}. {note}", text.trim_end_matches('.'));
        }
        self
    }

    /// Further members of the JSON response, each after a comma.
    pub fn extra(&self) -> String {
        match self {
            ApiError::List(ListError::Invalid(Invalid { lines, .. })) => {
                format!(",\"lines\":{}", lines_json(lines))
            }
            _ => String::new(),
        }
    }

    /// The header field that goes with the status.
    pub fn header(&self) -> String {
        match self {
            ApiError::Unauthorized => "WWW-Authenticate: Basic realm=\"rfw\"\r\n".into(),
            ApiError::Method(allow) => format!("Allow: {allow}\r\n"),
            ApiError::Busy(_) => "Retry-After: 1\r\n".into(),
            ApiError::TooManyGuesses(left) => {
                format!("Retry-After: {}\r\n", left.as_secs().saturating_add(1))
            }
            _ => String::new(),
        }
    }
}

/// Invalid lines of a list as a JSON array.
pub fn lines_json(lines: &[(usize, RuleError)]) -> String {
    let line = |(line, error): &(usize, RuleError)| {
        format!("{{\"line\":{line},\"message\":{}}}", json::string(&describe_rule_error(error).2))
    };
    format!("[{}]", lines.iter().map(line).collect::<Vec<_>>().join(","))
}

fn describe_list_error(error: &ListError) -> (u16, &'static str, String) {
    match error {
        ListError::TooMany => {
            http(413, format!("A list may have at most {MAX_ENTRIES} addresses and blocks."))
        }
        ListError::Empty => (
            400,
            "empty_list",
            "The body names no address that may be changed; nothing was applied. Send a list with curl -T FILE or \
             --data-binary @FILE (-d strips the newlines), or name an address in the path."
                .into(),
        ),
        ListError::Invalid(Invalid { count, entries, lines }) => {
            let first = lines.first().map_or(String::new(), |(line, error)| {
                format!(" Line {line}: {}", describe_rule_error(error).2)
            });
            let end = if *count > entries / 2 {
                "; a body with more invalid lines than valid ones is not a list. Send one entry per \
                 line, a file with curl -T FILE or --data-binary @FILE (-d strips the newlines)."
            } else {
                "; lenient=true skips invalid lines."
            };
            let message =
                format!("{count} of {entries} lines are invalid.{first} Nothing was applied{end}");
            (400, "bad_list", message)
        }
    }
}

fn describe_rule_error(error: &RuleError) -> (u16, &'static str, String) {
    let (code, message) = match error {
        RuleError::Unknown | RuleError::Shape => (
            "bad_path",
            "The path must be /TARGET/CHAIN/IFACE/IP[/MASK], or end at IFACE with a list in the \
             body; GET / shows all forms."
                .into(),
        ),
        RuleError::NoAddress => (
            "bad_path",
            "A rule in FORWARD must name an address; without one it matches all routed packets."
                .into(),
        ),
        RuleError::Iface(name) => (
            "bad_interface",
            format!(
                "{} is not an interface; write any, a name such as eth0 (up to 15 of A-Z a-z 0-9 . \
                 _ @ -), or a prefix such as ppp (up to 14).",
                quoted(name)
            ),
        ),
        RuleError::NoIface(path) => (
            "bad_interface",
            format!("The path names no interface; write any for every interface, as in {path}."),
        ),
        RuleError::FileName(path) => (
            "bad_interface",
            format!(
                "This path ends in a file name, which curl -T appends to a URL that ends in /; \
                 send the list to {path}, without a final /."
            ),
        ),
        RuleError::Address(text) => ("bad_address", address_message(text)),
        RuleError::AnyAddress => {
            ("bad_address", "0.0.0.0 and :: mean any address, which only FORWARD accepts.".into())
        }
        RuleError::Families => ("bad_address", "Both addresses must be IPv4, or both IPv6.".into()),
        RuleError::Mask(text) => ("bad_mask", mask_message(text)),
        RuleError::Wide(net) => {
            let (family, widest) = (net.family(), widest(net.family()));
            let message = format!(
                "{net} is wider than /{widest}, the widest block of {family}; leave it out, or split it."
            );
            ("bad_mask", message)
        }
        RuleError::Range(text) => (
            "bad_address",
            format!(
                "{} is not a range; write FIRST-LAST, both of one family, FIRST not above LAST.",
                quoted(text)
            ),
        ),
        RuleError::Long => {
            ("bad_address", format!("A line may have at most {MAX_LINE} bytes before its comment."))
        }
    };
    (400, code, message)
}

/// Says that a text is not an address, with a hint for each common mistake.
fn address_message(text: &str) -> String {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let first = text.split_whitespace().next().unwrap_or_default();
    let hint = if let Ok(socket) = text.parse::<SocketAddr>() {
        format!("a rule covers all ports, so write {}", socket.ip())
    } else if let (Ok(ip), true) = (bare.parse::<IpAddr>(), bare != text) {
        format!("write {ip}, without brackets")
    } else if Net::parse(text).is_some() {
        "write its / as /, not as %2F".into()
    } else if let (Ok(ip), true) = (first.parse::<IpAddr>(), first != text) {
        let rest = text.get(first.len()..).unwrap_or_default().trim();
        match prefix_of(rest) {
            Some(prefix) => format!("write the netmask as a prefix length: {ip}/{prefix}"),
            None => format!("write {ip} alone, or start a comment with #"),
        }
    } else {
        "write an address like 192.0.2.1 or 2001:db8::1".into()
    };
    format!("{} is not an address; {hint}.", quoted(text))
}

/// Says that `ADDRESS/MASK` is not a block, with a hint if the mask is a netmask.
fn mask_message(text: &str) -> String {
    let (address, mask) = text.split_once('/').unwrap_or((text, ""));
    match prefix_of(mask) {
        Some(prefix) => {
            let mask = quoted(mask);
            format!("{mask} is a netmask; write it as a prefix length: {address}/{prefix}.")
        }
        None => format!(
            "{} is not a block; its mask must be {WIDEST_V4} to 32 for IPv4, {WIDEST_V6} to 128 \
             for IPv6.",
            quoted(text)
        ),
    }
}

/// The prefix length of an IPv4 netmask such as 255.255.255.0.
fn prefix_of(netmask: &str) -> Option<u32> {
    let bits = netmask.parse::<Ipv4Addr>().ok()?.to_bits();
    Some(bits.leading_ones()).filter(|ones| bits.count_ones() == *ones)
}

/// Quotes a client's text, escaped and cut to [`MAX_SHOWN`] characters.
fn quoted(text: &str) -> String {
    let shown: String = text.chars().take(MAX_SHOWN).collect();
    let dots = if shown == text { "" } else { "..." };
    format!("'{}{dots}'", shown.escape_debug())
}

/// The reason phrase (RFC 9110, 15) and error code of a status.
pub fn names(status: u16) -> (&'static str, &'static str) {
    match status {
        200 => ("OK", ""),
        400 => ("Bad Request", "bad_request"),
        401 => ("Unauthorized", "unauthorized"),
        403 => ("Forbidden", "forbidden"),
        404 => ("Not Found", "not_found"),
        405 => ("Method Not Allowed", "method_not_allowed"),
        408 => ("Request Timeout", "request_timeout"),
        409 => ("Conflict", "conflict"),
        413 => ("Content Too Large", "content_too_large"),
        414 => ("URI Too Long", "uri_too_long"),
        417 => ("Expectation Failed", "expectation_failed"),
        429 => ("Too Many Requests", "too_many_requests"),
        431 => ("Request Header Fields Too Large", "header_too_large"),
        501 => ("Not Implemented", "not_implemented"),
        503 => ("Service Unavailable", "busy"),
        507 => ("Insufficient Storage", "insufficient_storage"),
        505 => ("HTTP Version Not Supported", "version_not_supported"),
        _ => ("Internal Server Error", "internal"),
    }
}

fn not_applied(sentence: &str) -> String {
    format!("{sentence} Nothing was applied.")
}

/// An error whose code is that of its status.
fn http(status: u16, message: impl Into<String>) -> (u16, &'static str, String) {
    (status, names(status).1, message.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::tag::Tag;

    #[test]
    fn status_code_and_message() {
        let tags = ["a", "b"].map(|tag| Tag::parse(tag).unwrap()).into();
        let x = || String::from("x");
        let net = |text: &str| Net::parse(text).unwrap();
        let (white, own) =
            (Conflict::Whitelisted(net("1.2.3.0/24")), Conflict::Own(net("1.2.3.4")));
        let invalid = |count, entries| {
            let lines = vec![(2, RuleError::Long)];
            ApiError::List(ListError::Invalid(Invalid { count, entries, lines }))
        };
        let table = [
            (ApiError::Http(414, "x"), 414, "uri_too_long", "x"),
            (ApiError::Unauthorized, 401, "unauthorized", "of rfw.conf or auth.file."),
            (ApiError::Forbidden(vec![]), 403, "forbidden", "may send GET only."),
            (ApiError::Forbidden(tags), 403, "forbidden", "with tag=a or tag=b."),
            (ApiError::TooManyGuesses(Duration::ZERO), 429, "too_many_requests", "Too many wrong"),
            (ApiError::Rule(RuleError::Unknown), 404, "not_found", "No such action"),
            (ApiError::Method("GET"), 405, "method_not_allowed", "supports only GET."),
            (ApiError::Rule(RuleError::Shape), 400, "bad_path", "The path must be"),
            (ApiError::Rule(RuleError::NoAddress), 400, "bad_path", "must name an address"),
            (
                ApiError::Rule(RuleError::Iface(x())),
                400,
                "bad_interface",
                "'x' is not an interface",
            ),
            (ApiError::Rule(RuleError::FileName(x())), 400, "bad_interface", "the list to x,"),
            (ApiError::Rule(RuleError::NoIface(x())), 400, "bad_interface", "as in x."),
            (ApiError::Rule(RuleError::Address(x())), 400, "bad_address", "'x' is not an address"),
            (ApiError::Rule(RuleError::AnyAddress), 400, "bad_address", "only FORWARD accepts"),
            (ApiError::Rule(RuleError::Families), 400, "bad_address", "Both addresses"),
            (ApiError::Rule(RuleError::Mask(x())), 400, "bad_mask", "be 9 to 32 for IPv4, 17"),
            (ApiError::Rule(RuleError::Wide(net("1.0.0.0/8"))), 400, "bad_mask", "wider than /9"),
            (ApiError::Rule(RuleError::Wide(net("1::/8"))), 400, "bad_mask", "wider than /17"),
            (ApiError::Rule(RuleError::Range(x())), 400, "bad_address", "'x' is not a range"),
            (ApiError::Rule(RuleError::Long), 400, "bad_address", "1024 bytes"),
            (ApiError::Query(x()), 400, "bad_query", "x"),
            (ApiError::Expire(x()), 400, "bad_expire", "'x' is not an interval"),
            (ApiError::LongExpire, 400, "bad_expire", "at most 2147483 s (24 days); 0"),
            (invalid(3, 6), 400, "bad_list", "3 of 6 lines are invalid. Line 2: A line may have"),
            (invalid(3, 6), 400, "bad_list", "comment. Nothing was applied; lenient=true"),
            (invalid(3, 5), 400, "bad_list", "is not a list. Send one entry per line, a file"),
            (invalid(1, 1), 400, "bad_list", "-T FILE or --data-binary @FILE"),
            (ApiError::List(ListError::TooMany), 413, "content_too_large", "at most 1000000"),
            (ApiError::List(ListError::Empty), 400, "empty_list", "-T FILE or --data-binary @FILE"),
            (ApiError::SetFull("No room."), 507, "set_full", "Nothing was applied"),
            (ApiError::Full("No room."), 507, "insufficient_storage", "Nothing was applied"),
            (ApiError::State("x.".into()), 507, "state_failed", "x. Nothing was applied"),
            (ApiError::Whitelisted(white), 409, "whitelisted", "overlaps 1.2.3.0/24 of"),
            (ApiError::Whitelisted(own), 409, "whitelisted", "1.2.3.4, this host's own address"),
            (ApiError::NoIpv6, 400, "bad_address", "not filter IPv6"),
            (ApiError::Iptables(x()), 500, "iptables_failed", "x"),
            (ApiError::Busy("x.".into()), 503, "busy", "x. Try again in a moment."),
        ];
        for (error, status, code, part) in table {
            let (got_status, got_code, message) = error.describe();
            assert_eq!((got_status, got_code), (status, code), "{error:?}");
            assert!(message.contains(part), "{message}");
            let line = "A line may have at most 1024 bytes before its comment.";
            let lines = format!("[{{\"line\":2,\"message\":\"{line}\"}}]");
            let members =
                if code == "bad_list" { format!(",\"lines\":{lines}") } else { String::new() };
            assert_eq!(error.extra(), members);
        }
    }

    #[test]
    fn common_mistakes_have_hints() {
        let table = [
            (
                "[2001:db8::1]",
                "'[2001:db8::1]' is not an address; write 2001:db8::1, without brackets.",
            ),
            ("1.2.3.0/24", "'1.2.3.0/24' is not an address; write its / as /, not as %2F."),
            (
                "1.2.3.4:80",
                "'1.2.3.4:80' is not an address; a rule covers all ports, so write 1.2.3.4.",
            ),
            (
                "[2001:db8::1]:443",
                "'[2001:db8::1]:443' is not an address; a rule covers all ports, so write 2001:db8::1.",
            ),
            (
                "1.2.3.0 255.255.255.0",
                "'1.2.3.0 255.255.255.0' is not an address; write the netmask as a prefix length: 1.2.3.0/24.",
            ),
            (
                "1.2.3.4\t80",
                "'1.2.3.4\\t80' is not an address; write 1.2.3.4 alone, or start a comment with #.",
            ),
            (
                "1.2.3.4 255.0.255.0",
                "'1.2.3.4 255.0.255.0' is not an address; write 1.2.3.4 alone, or start a comment with #.",
            ),
            (
                "\u{1b}[2J",
                "'\\u{1b}[2J' is not an address; write an address like 192.0.2.1 or 2001:db8::1.",
            ),
            ("", "'' is not an address; write an address like 192.0.2.1 or 2001:db8::1."),
        ];
        for (text, message) in table {
            assert_eq!(address_message(text), message);
        }
        let table = [
            (
                "1.2.3.0/255.255.255.0",
                "'255.255.255.0' is a netmask; write it as a prefix length: 1.2.3.0/24.",
            ),
            (
                "1.2.3.0/0.0.0.255",
                "'1.2.3.0/0.0.0.255' is not a block; its mask must be 9 to 32 for IPv4, 17 to 128 for IPv6.",
            ),
            (
                "1.2.3.0/33",
                "'1.2.3.0/33' is not a block; its mask must be 9 to 32 for IPv4, 17 to 128 for IPv6.",
            ),
        ];
        for (text, message) in table {
            assert_eq!(mask_message(text), message);
        }
        assert_eq!(quoted(&"é".repeat(80)), format!("'{}'", "é".repeat(80)));
        assert_eq!(quoted(&"é".repeat(81)), format!("'{}...'", "é".repeat(80)));
    }

    /// "cannot open shared object file Any part of it that took effect ..."
    #[test]
    fn a_note_begins_a_sentence() {
        for (text, note, whole) in [
            ("No such file", "It failed.", "No such file. It failed."),
            ("It hung.", "It failed.", "It hung. It failed."),
            ("No such file", "", "No such file"),
        ] {
            assert_eq!(ApiError::Busy(text.into()).with_note(note), ApiError::Busy(whole.into()));
        }
    }

    #[test]
    fn fields() {
        let table = [
            (ApiError::Unauthorized, "WWW-Authenticate: Basic realm=\"rfw\"\r\n"),
            (ApiError::Method("PUT, DELETE"), "Allow: PUT, DELETE\r\n"),
            (ApiError::Busy(String::new()), "Retry-After: 1\r\n"),
            (ApiError::TooManyGuesses(Duration::from_millis(7_900)), "Retry-After: 8\r\n"),
            (ApiError::Rule(RuleError::Unknown), ""),
        ];
        for (error, field) in table {
            assert_eq!(error.header(), field);
        }
    }

    /// RFC 9110, 15; RFC 6585 has 429 and 431, RFC 4918 has 507.
    #[test]
    fn reasons() {
        let table = [
            (200, "OK", ""),
            (400, "Bad Request", "bad_request"),
            (401, "Unauthorized", "unauthorized"),
            (403, "Forbidden", "forbidden"),
            (404, "Not Found", "not_found"),
            (405, "Method Not Allowed", "method_not_allowed"),
            (408, "Request Timeout", "request_timeout"),
            (409, "Conflict", "conflict"),
            (413, "Content Too Large", "content_too_large"),
            (414, "URI Too Long", "uri_too_long"),
            (417, "Expectation Failed", "expectation_failed"),
            (429, "Too Many Requests", "too_many_requests"),
            (431, "Request Header Fields Too Large", "header_too_large"),
            (500, "Internal Server Error", "internal"),
            (501, "Not Implemented", "not_implemented"),
            (503, "Service Unavailable", "busy"),
            (505, "HTTP Version Not Supported", "version_not_supported"),
            (507, "Insufficient Storage", "insufficient_storage"),
        ];
        for (status, reason, code) in table {
            assert_eq!(names(status), (reason, code), "{status}");
        }
    }
}
