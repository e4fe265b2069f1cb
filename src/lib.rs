//! rfw: a REST server that blocks and allows IP addresses in iptables.
//!
//! In the order in which a request travels:
//!
//! 1. [`server`]: the listeners, the limit on connections, and the whole life of a request;
//! 2. [`http`]: bytes to requests, credentials to principals, responses to bytes;
//! 3. [`api`]: requests to commands, outcomes to JSON;
//! 4. [`rule`]: what a rule is, and the whitelist that protects addresses from changes;
//! 5. [`firewall`]: from a change to the list, the state file and the kernel.
//!
//! Used by all of them:
//!
//! - [`config`], the text of rfw.conf, and [`setup`], everything that it names, read and checked;
//! - [`file`], the owners and permissions of the files that rfw reads;
//! - [`nearest`], "did you mean ...?";
//! - [`state`], the list on disk;
//! - [`host`], this host's addresses and interfaces;
//! - [`notify`], readiness for the supervisor;
//! - [`log`], [`metrics`], [`clock`] and [`mutex`].
//!
//! [`client`] is rfwc, the same program under another name: from the command line to the request.
//! It shares [`http::response_head`], [`http::tls`] and [`http::deadline`] with the server.

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
