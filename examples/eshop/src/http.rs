//! The shop's door: place, look at and cancel orders.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use eventbus::{Error, ErrorKind, HealthState, Monitor};
use serde::Deserialize;
use serde_json::json;

use crate::contracts::{OrderId, UserCheckoutAccepted};
use crate::db::Db;
use crate::machine::{Input, Next, on};
use crate::orders_file::MAX_STORED;
use crate::shop::Shop;
use crate::{basket, ordering};

struct Door<D: Db> {
    shop: Arc<Shop<D>>,
    services: Vec<Monitor>,
}

/// An order as a buyer writes it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NewOrder {
    buyer: u64,
    product: u32,
    quantity: u32,
    amount_cents: u64,
}

/// Takes the address, so that a port in use is known at once.
///
/// # Errors
/// [`Config`](ErrorKind::Config) naming the address.
pub async fn bind(address: SocketAddr) -> eventbus::Result<tokio::net::TcpListener> {
    tokio::net::TcpListener::bind(address).await.map_err(|error| {
        Error::new(ErrorKind::Config, "the address cannot be listened on: choose another with --listen")
            .with("address", address)
            .caused_by(error)
    })
}

/// Serves until the process ends.
pub async fn serve<D: Db>(listener: tokio::net::TcpListener, shop: Arc<Shop<D>>, services: Vec<Monitor>) {
    let routes = Router::new()
        .route("/v1/orders", post(place::<D>))
        .route("/v1/orders/{id}", get(show::<D>))
        .route("/v1/orders/{id}/cancel", post(cancel::<D>))
        .route("/health", get(health::<D>))
        .with_state(Arc::new(Door { shop, services }));
    if let Err(error) = axum::serve(listener, routes).await {
        tracing::error!(%error, "the door is closed");
    }
}

/// Says of every subscription of this process whether it runs, and why not.
async fn health<D: Db>(State(door): State<Arc<Door<D>>>) -> Response {
    let all: Vec<_> = door.services.iter().flat_map(Monitor::health).collect();
    let word = |state| match state {
        HealthState::Running => "running",
        HealthState::Paused { .. } => "paused",
        _ => "degraded",
    };
    let rows = all.iter().map(|health| {
        json!({"topic": health.topic.as_str(), "group": health.group.as_str(), "state": word(health.state),
        "reason": health.reason()})
    });
    let rows: Vec<_> = rows.collect();
    let ill = all.iter().find(|health| !health.is_running());
    let status = if ill.is_some() { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    let whole = ill.map_or("running", |health| word(health.state));
    (status, Json(json!({"status": whole, "subscriptions": rows}))).into_response()
}

fn problem(status: StatusCode, text: impl std::fmt::Display) -> Response {
    (status, Json(json!({"error": text.to_string()}))).into_response()
}

fn unavailable(error: &Error) -> Response {
    problem(StatusCode::SERVICE_UNAVAILABLE, error)
}

async fn place<D: Db>(
    State(door): State<Arc<Door<D>>>,
    headers: HeaderMap,
    Json(order): Json<NewOrder>,
) -> Response {
    if order.quantity == 0 || order.buyer >= MAX_STORED || order.amount_cents >= MAX_STORED {
        return problem(
            StatusCode::UNPROCESSABLE_ENTITY,
            "quantity must be at least 1, buyer and amount_cents below 2^63",
        );
    }
    let request = match headers.get("x-request-id").map(|value| value.to_str()) {
        None => None,
        Some(Ok(id)) if !id.is_empty() => Some(id.to_owned()),
        Some(_) => return problem(StatusCode::BAD_REQUEST, "x-request-id must be visible ASCII"),
    };
    let NewOrder { buyer, product, quantity, amount_cents } = order;
    let checkout = |order| UserCheckoutAccepted { order, buyer, product, quantity, amount_cents };
    match basket::check_out(&door.shop.basket, request, checkout).await {
        Ok(order) => (StatusCode::ACCEPTED, Json(json!({"order": order}))).into_response(),
        Err(error) if error.kind() == ErrorKind::Conflict => problem(StatusCode::CONFLICT, error),
        Err(error) => unavailable(&error),
    }
}

/// An order as the door knows it.
enum Known {
    /// Ordering has it.
    Stored(ordering::Order),
    /// Its checkout is on the way to ordering.
    Accepted,
    Unknown,
}

async fn known<D: Db>(door: &Door<D>, id: OrderId) -> eventbus::Result<Known> {
    // A number that no table can have is nobody's.
    if id >= MAX_STORED {
        return Ok(Known::Unknown);
    }
    if let Some(order) = ordering::find(&mut *door.shop.ordering.look().await?, id).await? {
        return Ok(Known::Stored(order));
    }
    let is_accepted = basket::has_accepted(&mut *door.shop.basket.look().await?, id).await?;
    Ok(if is_accepted { Known::Accepted } else { Known::Unknown })
}

async fn show<D: Db>(State(door): State<Arc<Door<D>>>, Path(id): Path<OrderId>) -> Response {
    match known(&door, id).await {
        Ok(Known::Accepted) => Json(json!({"order": id, "status": "Accepted"})).into_response(),
        Ok(Known::Stored(order)) => Json(json!({
            "order": order.id, "buyer": order.buyer, "product": order.product, "quantity": order.quantity,
            "amount_cents": order.amount_cents, "status": order.status, "cancelled_by": order.cancelled_by,
        }))
        .into_response(),
        Ok(Known::Unknown) => problem(StatusCode::NOT_FOUND, format_args!("there is no order {id}")),
        Err(error) => unavailable(&error),
    }
}

async fn cancel<D: Db>(State(door): State<Arc<Door<D>>>, Path(id): Path<OrderId>) -> Response {
    match known(&door, id).await {
        Ok(Known::Stored(order)) if on(order.status, Input::Cancel) == Next::Refuse => {
            return problem(
                StatusCode::CONFLICT,
                format_args!("order {id} is {} and cannot be cancelled", order.status.as_str()),
            );
        }
        // The command waits for an order that is still on its way.
        Ok(Known::Stored(_) | Known::Accepted) => {}
        Ok(Known::Unknown) => {
            return problem(StatusCode::NOT_FOUND, format_args!("there is no order {id}"));
        }
        Err(error) => return unavailable(&error),
    }
    match ordering::ask_to_cancel(&door.shop.ordering, id).await {
        Ok(()) => (StatusCode::ACCEPTED, Json(json!({"order": id}))).into_response(),
        Err(error) => unavailable(&error),
    }
}
