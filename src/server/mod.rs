//! The servers: from accept to the last byte of the last response.
//!
//! [`listener`] accepts connections, [`limiter`] limits how many are served at a time, and
//! [`connection`] is the whole life of a request.

pub mod connection;
pub mod limiter;
pub mod listener;

use crate::api::Grammar;
use crate::firewall::Firewall;
use crate::http::auth::{LoginThrottle, Users};
use crate::log::Log;
use crate::metrics::Metrics;
use crate::rule::whitelist::Whitelist;
use limiter::ConnectionLimiter;
use std::sync::Arc;

/// What all listeners share.
pub struct Server {
    pub firewall: Firewall,
    pub whitelist: Whitelist,
    pub log: Arc<Log>,
    pub metrics: Arc<Metrics>,
    pub grammar: Grammar,
    pub users: Users,
    pub throttle: LoginThrottle,
    /// A slot for each list that is being received.
    pub uploads: Arc<ConnectionLimiter>,
    /// A slot for each long listing that is being read and sent.
    pub listings: Arc<ConnectionLimiter>,
    /// The slot for reading a listing from the kernel.
    pub reading: Arc<ConnectionLimiter>,
    /// The addresses of the servers, for the help text.
    pub addresses: String,
}
