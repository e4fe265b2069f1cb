//! The only way to lock a Mutex.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a Mutex. It is never poisoned, because a panic aborts the process.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
