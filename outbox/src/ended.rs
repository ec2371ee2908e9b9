use tokio::task::JoinError;

/// What to do about a task that did not return: its panic goes on here. One that was cancelled has met the end of the runtime;
/// nobody asks this one again either.
pub(crate) async fn without_answer<T>(error: JoinError) -> T {
    if error.is_panic() {
        std::panic::resume_unwind(error.into_panic());
    }
    std::future::pending().await
}
