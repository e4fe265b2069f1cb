//! Every refusal with its status, code and sentence.

use super::json;
use crate::rule::interval::LONGEST_IN_SET;
use crate::rule::list::{MAX_ENTRIES, MAX_LINE, Wrong};
use crate::rule::net::Net;
use crate::rule::rights::Forbidden;
use crate::rule::{RuleError, WIDEST_V4, WIDEST_V6};
use std::time::Duration;

/// Why a request is not carried out. This is the one place where reasons
/// become status codes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// A status of HTTP's own, and what to do.
    Http(u16, &'static str),
    Unauthorized,
    /// Too many wrong credentials from this address; so long to wait.
    Guessing(Duration),
    /// Not with the rights of this user.
    Forbidden(Forbidden),
    NotFound,
    /// The path has a meaning for these methods only.
    Method(&'static str),
    Rule(RuleError),
    /// A parameter that is unknown, given twice, or has a wrong value.
    Query(String),
    /// Not a tag.
    Tag(String),
    /// Not an interval.
    Expire(String),
    /// Longer than an address is kept in a set.
    LongExpire,
    /// Lines of a list that name no rule.
    List(Wrong),
    TooMany,
    /// There is no room for so many; what to do.
    Full(&'static str),
    /// The state file cannot be written, as this sentence says.
    State(String),
    /// The change overlaps this block of the whitelist.
    Whitelisted(Net),
    /// An IPv6 rule on a host without IPv6.
    NoIpv6,
    /// The kernel did not take the rule; iptables' own words.
    Iptables(String),
    /// Try again in a moment.
    Busy(String),
}

impl Refusal {
    /// Status code, error code and sentence.
    pub fn parts(&self) -> (u16, &'static str, String) {
        match self {
            Refusal::Http(status, message) => (*status, code(*status), message.to_string()),
            Refusal::Unauthorized => {
                (401, code(401), "Send the user name and password of rfw.conf or auth.file.".into())
            }
            Refusal::Guessing(_) => {
                (429, code(429), "Too many wrong credentials; wait for a minute.".into())
            }
            Refusal::Forbidden(forbidden) => (403, code(403), forbidden.to_string()),
            Refusal::NotFound | Refusal::Rule(RuleError::Unknown) => {
                (404, code(404), "No such action or chain; GET / shows what there is.".into())
            }
            Refusal::Method(allow) => {
                (405, code(405), format!("The methods for this path are {allow}."))
            }
            Refusal::Rule(error) => rule_parts(error),
            Refusal::Query(message) => (400, "bad_query", message.clone()),
            Refusal::Tag(text) => {
                let write =
                    "write 1 to 20 of a-z, 0-9, '.', '_' and '-', the first a letter or digit";
                (400, "bad_tag", format!("'{text}' is not a tag; {write}."))
            }
            Refusal::Expire(text) => {
                let write = "write up to 9 digits and s, m, h or d, as in 10m";
                (400, "bad_expire", format!("'{text}' is no interval; {write}."))
            }
            Refusal::LongExpire => {
                let most = format!(
                    "In a set an address expires after {LONGEST_IN_SET} s (24 days) at most"
                );
                (400, "bad_expire", format!("{most}; 0 is for ever."))
            }
            Refusal::List(Wrong { count, .. }) => {
                let message =
                    format!("Lines that are wrong: {count}. Nothing of the list is applied.");
                (400, "bad_list", message)
            }
            Refusal::TooMany => {
                (413, code(413), format!("A list may have {MAX_ENTRIES} entries at most."))
            }
            Refusal::Full(sentence) => (507, code(507), format!("{sentence} Nothing was applied.")),
            Refusal::State(sentence) => {
                (507, "state_failed", format!("{sentence} Nothing was applied."))
            }
            Refusal::Whitelisted(net) => {
                (409, "whitelisted", format!("This overlaps {net} of the whitelist."))
            }
            Refusal::NoIpv6 => {
                (400, "bad_address", "This host filters no IPv6; send IPv4 addresses.".into())
            }
            Refusal::Iptables(words) => (500, "iptables_failed", words.clone()),
            Refusal::Busy(reason) => (503, "busy", format!("{reason} Try again in a moment.")),
        }
    }

    /// What else the answer says, as members of a JSON object.
    pub fn members(&self) -> String {
        let Refusal::List(Wrong { lines, .. }) = self else { return String::new() };
        let line = |(line, error): &(usize, RuleError)| {
            format!("{{\"line\":{line},\"message\":{}}}", json::string(&rule_parts(error).2))
        };
        format!(",\"lines\":[{}]", lines.iter().map(line).collect::<Vec<_>>().join(","))
    }

    /// The field that belongs to the status.
    pub fn field(&self) -> String {
        match self {
            Refusal::Unauthorized => "WWW-Authenticate: Basic realm=\"rfw\"\r\n".into(),
            Refusal::Method(allow) => format!("Allow: {allow}\r\n"),
            Refusal::Busy(_) => "Retry-After: 1\r\n".into(),
            Refusal::Guessing(left) => {
                format!("Retry-After: {}\r\n", left.as_secs().saturating_add(1))
            }
            _ => String::new(),
        }
    }
}

fn rule_parts(error: &RuleError) -> (u16, &'static str, String) {
    let (code, message) = match error {
        RuleError::Unknown | RuleError::Shape => (
            "bad_path",
            "The path must be /TARGET/CHAIN/IFACE/IP[/MASK], or end at IFACE with a list in the \
             body; GET / shows all forms."
                .into(),
        ),
        RuleError::Iface(name) => (
            "bad_interface",
            format!(
                "'{name}' is no interface; write any, or up to 15 of A-Z a-z 0-9 . _ @ - \
                 such as eth0, or up to 14 such as ppp for all that start so."
            ),
        ),
        RuleError::Address(text) => (
            "bad_address",
            format!("'{text}' is no host; write an address like 192.0.2.1 or 2001:db8::1."),
        ),
        RuleError::AnyAddress => {
            ("bad_address", "0.0.0.0 and :: are any address, which only FORWARD takes.".into())
        }
        RuleError::Families => ("bad_address", "Both addresses must be IPv4, or both IPv6.".into()),
        RuleError::Mask(text) => {
            let write = format!("{WIDEST_V4} to 32 for IPv4, {WIDEST_V6} to 128 for IPv6");
            ("bad_mask", format!("'{text}' is no mask; write {write}."))
        }
        RuleError::Range(text) => (
            "bad_address",
            format!(
                "'{text}' is no range; write FIRST-LAST, both of one family, around no block \
                 wider than /{WIDEST_V4} or, for IPv6, /{WIDEST_V6}."
            ),
        ),
        RuleError::Long => {
            ("bad_address", format!("A line may have {MAX_LINE} bytes before its comment."))
        }
    };
    (400, code, message)
}

/// Reason phrase (RFC 9110, 15) and the error code that goes with it.
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
        429 => ("Too Many Requests", "too_many_guesses"),
        431 => ("Request Header Fields Too Large", "header_too_large"),
        501 => ("Not Implemented", "not_implemented"),
        503 => ("Service Unavailable", "busy"),
        507 => ("Insufficient Storage", "set_full"),
        505 => ("HTTP Version Not Supported", "version_not_supported"),
        _ => ("Internal Server Error", "internal"),
    }
}

fn code(status: u16) -> &'static str {
    names(status).1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::tag::Tag;

    #[test]
    fn status_code_and_sentence() {
        let x = || String::from("x");
        let net = Net::parse("1.2.3.0/24").unwrap();
        let wrong = Wrong { count: 7, lines: vec![(2, RuleError::Long)] };
        let table = [
            (Refusal::Http(414, "x"), 414, "uri_too_long", "x"),
            (Refusal::Unauthorized, 401, "unauthorized", "of rfw.conf or auth.file."),
            (Refusal::Forbidden(Forbidden(vec![])), 403, "forbidden", "may send GET only."),
            (
                Refusal::Forbidden(Forbidden(
                    ["a", "b"].map(|tag| Tag::parse(tag).unwrap()).into(),
                )),
                403,
                "forbidden",
                "GET, and changes with tag=a or tag=b.",
            ),
            (Refusal::Guessing(Duration::ZERO), 429, "too_many_guesses", "Too many wrong"),
            (Refusal::NotFound, 404, "not_found", "No such action"),
            (Refusal::Rule(RuleError::Unknown), 404, "not_found", "No such action"),
            (Refusal::Method("GET"), 405, "method_not_allowed", "for this path are GET."),
            (Refusal::Rule(RuleError::Shape), 400, "bad_path", "The path must be"),
            (Refusal::Rule(RuleError::Iface(x())), 400, "bad_interface", "'x' is no interface"),
            (Refusal::Rule(RuleError::Address(x())), 400, "bad_address", "'x' is no host"),
            (Refusal::Rule(RuleError::AnyAddress), 400, "bad_address", "only FORWARD takes"),
            (Refusal::Rule(RuleError::Families), 400, "bad_address", "Both addresses"),
            (Refusal::Rule(RuleError::Mask(x())), 400, "bad_mask", "write 9 to 32 for IPv4, 17"),
            (Refusal::Rule(RuleError::Range(x())), 400, "bad_address", "'x' is no range"),
            (Refusal::Rule(RuleError::Long), 400, "bad_address", "1024 bytes"),
            (Refusal::Query(x()), 400, "bad_query", "x"),
            (Refusal::Expire(x()), 400, "bad_expire", "'x' is no interval"),
            (Refusal::LongExpire, 400, "bad_expire", "2147483 s (24 days) at most"),
            (Refusal::List(wrong.clone()), 400, "bad_list", "wrong: 7. Nothing"),
            (Refusal::TooMany, 413, "content_too_large", "1000000 entries"),
            (Refusal::Full("No room."), 507, "set_full", "Nothing was applied"),
            (Refusal::State("x.".into()), 507, "state_failed", "x. Nothing was applied"),
            (Refusal::Whitelisted(net), 409, "whitelisted", "overlaps 1.2.3.0/24"),
            (Refusal::NoIpv6, 400, "bad_address", "no IPv6"),
            (Refusal::Iptables(x()), 500, "iptables_failed", "x"),
            (Refusal::Busy("x.".into()), 503, "busy", "x. Try again in a moment."),
        ];
        for (refusal, status, code, words) in table {
            let (got_status, got_code, sentence) = refusal.parts();
            assert_eq!((got_status, got_code), (status, code), "{refusal:?}");
            assert!(sentence.contains(words), "{sentence}");
            let lines =
                "[{\"line\":2,\"message\":\"A line may have 1024 bytes before its comment.\"}]";
            let members =
                if code == "bad_list" { format!(",\"lines\":{lines}") } else { String::new() };
            assert_eq!(refusal.members(), members);
        }
    }

    #[test]
    fn fields() {
        let table = [
            (Refusal::Unauthorized, "WWW-Authenticate: Basic realm=\"rfw\"\r\n"),
            (Refusal::Method("PUT, DELETE"), "Allow: PUT, DELETE\r\n"),
            (Refusal::Busy(String::new()), "Retry-After: 1\r\n"),
            (Refusal::Guessing(Duration::from_millis(7_900)), "Retry-After: 8\r\n"),
            (Refusal::NotFound, ""),
        ];
        for (refusal, field) in table {
            assert_eq!(refusal.field(), field);
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
            (429, "Too Many Requests", "too_many_guesses"),
            (431, "Request Header Fields Too Large", "header_too_large"),
            (500, "Internal Server Error", "internal"),
            (501, "Not Implemented", "not_implemented"),
            (503, "Service Unavailable", "busy"),
            (505, "HTTP Version Not Supported", "version_not_supported"),
            (507, "Insufficient Storage", "set_full"),
        ];
        for (status, reason, code) in table {
            assert_eq!(names(status), (reason, code), "{status}");
        }
    }
}
