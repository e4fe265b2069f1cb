//! The one way to take a Mutex.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Waits for a Mutex. A thread that panics ends the process, so none is ever poisoned.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
