//! Values of a pass, with what the backward pass needs to know of how they came about.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Shape, Tensor, Var};

use super::backward::{Backward, Gradient};
use super::kept;
use crate::error::Result;

/// A tensor of a pass, mostly `[rows, columns]`, and what it was made of where something that trains is part
/// of it.
///
/// Operations of this module take and give values. What is frozen is a value without a history, and costs
/// nothing in the backward pass.
#[derive(Debug, Clone)]
pub struct Value {
    tensor: Tensor,
    source: Option<Source>,
}

/// Where the gradient of a value goes.
#[derive(Debug, Clone)]
pub(super) enum Source {
    /// To a tensor that trains, or that candle computed from such.
    Parameter(Tensor),
    /// To the operation that gave it.
    Node(Arc<Node>),
}

/// What an operation does with the gradient of its result: it gives their share to its operands.
type Step = Box<dyn FnOnce(Gradient, &mut Backward) -> Result<()> + Send>;

/// An operation that was recorded.
pub(super) struct Node {
    /// In the order in which operations were run: an operation's operands have smaller numbers than it.
    pub number: u64,
    step: Mutex<Option<Step>>,
}

impl Node {
    /// The step, which is taken once: what it keeps is freed with it.
    pub fn take(&self) -> Option<Step> {
        self.step.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        write!(formatter, "operation {}", self.number)
    }
}

static NEXT: AtomicU64 = AtomicU64::new(0);

impl Value {
    /// A constant, whatever it was made of.
    pub fn constant(tensor: Tensor) -> Self {
        let tensor = if tensor.track_op() { tensor.detach() } else { tensor };
        Value { tensor, source: None }
    }

    /// A tensor that trains where it is a variable or was computed from variables by candle, a constant
    /// otherwise.
    pub fn of(tensor: &Tensor) -> Self {
        match tensor.track_op() {
            true => {
                let source = Some(Source::Parameter(tensor.clone()));
                Value { tensor: tensor.detach(), source }
            }
            false => Value { tensor: tensor.clone(), source: None },
        }
    }

    /// The result of an operation that does this with its gradient.
    pub(super) fn made(
        tensor: Tensor,
        step: impl FnOnce(Gradient, &mut Backward) -> Result<()> + Send + 'static,
    ) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let node = Node { number, step: Mutex::new(Some(Box::new(step))) };
        Value { tensor, source: Some(Source::Node(Arc::new(node))) }
    }

    /// The same of an operation whose step keeps these tensors.
    pub(super) fn made_keeping(
        tensor: Tensor,
        kept: &[&Tensor],
        step: impl FnOnce(Gradient, &mut Backward) -> Result<()> + Send + 'static,
    ) -> Self {
        kept::note(kept);
        Value::made(tensor, step)
    }

    /// Its numbers, as a constant.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// A tensor that trains, for candle's operations; what an operation of a pass gave is a constant there.
    pub fn in_candle(&self) -> Tensor {
        match &self.source {
            Some(Source::Parameter(tensor)) => tensor.clone(),
            _ => self.tensor.clone(),
        }
    }

    /// The same numbers without a history.
    pub fn detach(&self) -> Self {
        Value { tensor: self.tensor.clone(), source: None }
    }

    /// Whether something that trains is part of it.
    pub fn is_tracked(&self) -> bool {
        self.source.is_some()
    }

    /// Where its gradient goes.
    pub(super) fn source(&self) -> Option<Source> {
        self.source.clone()
    }

    /// The sizes of its dimensions.
    pub fn dims(&self) -> &[usize] {
        self.tensor.dims()
    }

    /// Its shape.
    pub fn shape(&self) -> &Shape {
        self.tensor.shape()
    }

    /// The size of one dimension.
    pub fn dim(&self, index: usize) -> Result<usize> {
        Ok(self.tensor.dim(index)?)
    }

    /// Rows and columns of a matrix.
    pub fn dims2(&self) -> Result<(usize, usize)> {
        Ok(self.tensor.dims2()?)
    }

    /// The numbers of a vector.
    pub fn to_vec1(&self) -> Result<Vec<f32>> {
        Ok(self.tensor.to_vec1()?)
    }

    /// The numbers of a matrix, row by row.
    pub fn to_vec2(&self) -> Result<Vec<Vec<f32>>> {
        Ok(self.tensor.to_vec2()?)
    }

    /// Where it lies.
    pub fn device(&self) -> &Device {
        self.tensor.device()
    }
}

impl From<&Tensor> for Value {
    fn from(tensor: &Tensor) -> Self {
        Value::of(tensor)
    }
}

impl From<Tensor> for Value {
    fn from(tensor: Tensor) -> Self {
        Value::of(&tensor)
    }
}

/// An operation in candle's own operations: the oracle of tests, the path of devices without a kernel, and
/// enough for what is small.
///
/// `run` is given the operands' tensors, those that train as variables, from which candle computes their
/// gradients.
pub(super) fn through_candle(operands: &[&Value], run: impl FnOnce(&[Tensor]) -> Result<Tensor>) -> Result<Value> {
    let leaf = |operand: &&Value| -> Result<Tensor> {
        match operand.is_tracked() {
            true => Ok(Var::from_tensor(&operand.tensor)?.into_inner()),
            false => Ok(operand.tensor.clone()),
        }
    };
    let leaves = operands.iter().map(leaf).collect::<Result<Vec<_>>>()?;
    let result = run(&leaves)?;
    let sources: Vec<(Source, Tensor)> =
        operands.iter().zip(leaves).filter_map(|(operand, leaf)| Some((operand.source()?, leaf))).collect();
    if sources.is_empty() {
        return Ok(Value::constant(result));
    }
    kept::note(&sources.iter().map(|(_, leaf)| leaf).collect::<Vec<_>>());
    Ok(Value::made(result.detach(), move |gradient, backward| {
        let gradients = (result * gradient.into_tensor()?)?.sum_all()?.backward()?;
        for (source, leaf) in sources {
            if let Some(gradient) = gradients.get(&leaf) {
                backward.add(&source, Gradient::of_tensor(gradient.detach())?)?;
            }
        }
        Ok(())
    }))
}
