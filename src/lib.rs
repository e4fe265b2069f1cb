//! rfw: a REST server that blocks and allows IP addresses in iptables.
//!
//! In the order in which a request travels:
//!
//! 1. [`server`]: the listeners, how many connections at a time, and the whole life of a request;
//! 2. [`http`]: bytes to requests, requests to who is asking, responses to bytes;
//! 3. [`api`]: a request to a command;
//! 4. [`rule`]: what a rule is, and the whitelist that no change may touch;
//! 5. [`firewall`]: the command function, from a change to the kernel and back.
//!
//! Used by all of them: [`config`] (the text of rfw.conf), [`setup`] (everything that it names, read and
//! checked), [`file`] (who may own, write and read a file), [`nearest`] (did you mean ...?),
//! [`state`] (the list on disk), [`host`] (its own addresses and interfaces), [`log`], [`metrics`],
//! [`clock`], [`mutex`] and [`notify`] (rfw is ready).
//!
//! [`client`] is the same program under the name rfwc: from the command line to the request, with
//! [`http::answer`], [`http::tls`] and [`http::deadline`].

#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

pub mod api;
pub mod client;
pub mod clock;
pub mod config;
pub mod file;
pub mod firewall;
pub mod host;
pub mod http;
pub mod log;
pub mod metrics;
pub mod mutex;
pub mod nearest;
pub mod notify;
pub mod rule;
pub mod server;
pub mod setup;
pub mod state;
