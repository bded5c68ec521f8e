//! The backward pass.
//!
//! Operations are visited in the order opposite to that in which they were run, so that each has its whole
//! gradient when its turn comes. Gradients are added in place; what an operation kept is freed when its
//! gradient has been passed on.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Shape, Tensor, TensorId, Var};

use super::kept;
use super::matrix::{Matrix, has_kernel, update_chunks, with_elements, written};
use super::simd::add_to;
use super::value::{Node, Source, Value};
use crate::error::Result;

/// The gradient of one value, contiguous.
#[derive(Debug, Clone)]
pub struct Gradient {
    shape: Shape,
    numbers: Numbers,
}

/// Numbers that may have several owners; those with one are changed in place.
#[derive(Debug, Clone)]
enum Numbers {
    /// Single precision in main memory.
    Cpu(Arc<Vec<f32>>),
    /// Anything else.
    Other(Tensor),
}

impl Gradient {
    /// A gradient of this shape.
    pub(super) fn new(values: Vec<f32>, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        debug_assert_eq!(values.len(), shape.elem_count());
        Gradient { shape, numbers: Numbers::Cpu(Arc::new(values)) }
    }

    /// The gradient that a tensor holds.
    pub(super) fn of_tensor(tensor: Tensor) -> Result<Self> {
        let shape = tensor.shape().clone();
        let numbers = match has_kernel(&[&tensor]) {
            true => {
                Numbers::Cpu(Arc::new(with_elements(&tensor, |values| Ok::<_, candle_core::Error>(values.to_vec()))?))
            }
            false => Numbers::Other(tensor.contiguous()?),
        };
        Ok(Gradient { shape, numbers })
    }

    /// Its shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The same numbers in another shape of as many elements.
    pub(super) fn reshaped(self, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        debug_assert_eq!(self.shape.elem_count(), shape.elem_count());
        Gradient { shape, ..self }
    }

    /// `Σ g²`, which does not depend on the number of threads.
    pub fn squared_norm(&self) -> Result<f64> {
        match &self.numbers {
            Numbers::Cpu(values) => Ok(super::adamw::squares(values)),
            Numbers::Other(tensor) => super::adamw::squared_norm(tensor),
        }
    }

    /// Its numbers as a tensor, without a copy where it has no other owner.
    pub fn into_tensor(self) -> Result<Tensor> {
        Ok(match self.numbers {
            Numbers::Cpu(values) => {
                let values = Arc::try_unwrap(values).unwrap_or_else(|values| values.to_vec());
                Tensor::from_vec(values, self.shape, &candle_core::Device::Cpu)?
            }
            Numbers::Other(tensor) => tensor.reshape(self.shape)?,
        })
    }

    /// Its numbers as a tensor of their own.
    pub fn to_tensor(&self) -> Result<Tensor> {
        self.clone().into_tensor()
    }

    /// Its numbers.
    pub(super) fn values(&self) -> Result<&[f32]> {
        match &self.numbers {
            Numbers::Cpu(values) => Ok(values),
            Numbers::Other(tensor) => {
                crate::bail!("a gradient {:?} on {:?} has no kernel", self.shape, tensor.device())
            }
        }
    }

    /// It as a matrix.
    pub(super) fn matrix(&self) -> Result<Matrix<'_>> {
        let (rows, columns) = self.shape.dims2()?;
        Ok(Matrix::new(self.values()?, rows, columns))
    }

    /// Its numbers to be changed, where it has no other owner.
    pub(super) fn unshared(&mut self) -> Option<&mut [f32]> {
        match &mut self.numbers {
            Numbers::Cpu(values) => Arc::get_mut(values).map(Vec::as_mut_slice),
            Numbers::Other(_) => None,
        }
    }

    /// Its numbers to be changed, in a copy where it has other owners.
    fn to_mut(&mut self) -> Result<&mut [f32]> {
        match &mut self.numbers {
            Numbers::Cpu(values) => Ok(Arc::make_mut(values).as_mut_slice()),
            Numbers::Other(tensor) => {
                crate::bail!("a gradient {:?} on {:?} has no kernel", self.shape, tensor.device())
            }
        }
    }

    /// Adds another to it, in place where one of the two has no other owner.
    fn add(&mut self, mut other: Gradient) -> Result<()> {
        if self.shape != other.shape {
            crate::bail!("gradients of one value have the shapes {:?} and {:?}", self.shape, other.shape);
        }
        if let (Numbers::Other(sum), Numbers::Other(tensor)) = (&self.numbers, &other.numbers) {
            self.numbers = Numbers::Other((sum + tensor)?);
            return Ok(());
        }
        if self.unshared().is_none() && other.unshared().is_some() {
            std::mem::swap(self, &mut other);
        }
        let more = other.values()?;
        update_chunks(self.to_mut()?, |start, sum| add_to(sum, &more[start..][..sum.len()]));
        Ok(())
    }
}

/// Sums of the gradients of tensors that train, by the tensors.
#[derive(Debug, Default)]
pub struct Gradients {
    slots: HashMap<TensorId, Slot>,
    /// How many were there before each.
    count: usize,
}

#[derive(Debug)]
struct Slot {
    place: usize,
    tensor: Tensor,
    gradient: Gradient,
}

impl Gradients {
    /// The gradient of a tensor that trains; none where no loss depends on it.
    pub fn get(&self, tensor: &Tensor) -> Option<&Gradient> {
        self.slots.get(&tensor.id()).map(|slot| &slot.gradient)
    }

    /// Takes the gradient of a tensor out.
    pub fn take(&mut self, tensor: &Tensor) -> Option<Gradient> {
        self.slots.remove(&tensor.id()).map(|slot| slot.gradient)
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.slots.clear();
    }

    fn add(&mut self, tensor: &Tensor, gradient: Gradient) -> Result<()> {
        if let Some(slot) = self.slots.get_mut(&tensor.id()) {
            return slot.gradient.add(gradient);
        }
        let slot = Slot { place: self.count, tensor: tensor.clone(), gradient };
        self.slots.insert(tensor.id(), slot);
        self.count += 1;
        Ok(())
    }

    /// Takes out what belongs to tensors that candle computed, in the order in which it came.
    fn take_computed(&mut self) -> Vec<(Tensor, Gradient)> {
        let is_computed = |slot: &Slot| !slot.tensor.is_variable();
        let ids: Vec<TensorId> = self.slots.iter().filter(|(_, slot)| is_computed(slot)).map(|(&id, _)| id).collect();
        let mut taken: Vec<Slot> = ids.iter().filter_map(|id| self.slots.remove(id)).collect();
        taken.sort_by_key(|slot| slot.place);
        taken.into_iter().map(|Slot { tensor, gradient, .. }| (tensor, gradient)).collect()
    }

    /// Adds the gradients of the variables from which candle computed these tensors.
    fn add_through_candle(&mut self, computed: Vec<(Tensor, Gradient)>) -> Result<()> {
        let mut sum: Option<Tensor> = None;
        for (tensor, gradient) in computed {
            let part = (&tensor * gradient.into_tensor()?)?.sum_all()?;
            sum = Some(match sum {
                Some(sum) => (sum + part)?,
                None => part,
            });
        }
        sum.map_or(Ok(()), |sum| self.add_of_loss(&sum, &[]).map(drop))
    }

    /// Runs candle's backward pass of a loss, adds the gradients of variables, and gives those of `leaves`.
    fn add_of_loss(&mut self, loss: &Tensor, leaves: &[Var]) -> Result<Vec<Option<Gradient>>> {
        // candle's nodes that are variables and not the leaves are parameters of losses.
        let parameters: Vec<Tensor> =
            loss.sorted_nodes().into_iter().filter(|node| node.is_variable()).cloned().collect();
        let mut gradients = loss.backward()?;
        let of_leaves = leaves.iter().map(|leaf| gradients.remove(leaf.as_tensor()));
        let of_leaves = of_leaves.map(|found| found.map(|found| Gradient::of_tensor(found.detach())).transpose());
        let of_leaves = of_leaves.collect::<Result<Vec<_>>>()?;
        for parameter in parameters {
            if let Some(gradient) = gradients.remove(&parameter) {
                self.add(&parameter, Gradient::of_tensor(gradient.detach())?)?;
            }
        }
        Ok(of_leaves)
    }
}

/// A backward pass under way.
pub struct Backward<'a> {
    gradients: &'a mut Gradients,
    /// Operations whose results have a gradient, by their numbers.
    pending: BTreeMap<u64, (Arc<Node>, Gradient)>,
}

impl<'a> Backward<'a> {
    pub(super) fn new(gradients: &'a mut Gradients) -> Self {
        Backward { gradients, pending: BTreeMap::new() }
    }

    /// Adds to the gradient of a source.
    pub(super) fn add(&mut self, source: &Source, gradient: Gradient) -> Result<()> {
        match source {
            Source::Parameter(tensor) => self.gradients.add(tensor, gradient),
            Source::Node(node) => match self.pending.get_mut(&node.number) {
                Some((_, sum)) => sum.add(gradient),
                None => {
                    self.pending.insert(node.number, (node.clone(), gradient));
                    Ok(())
                }
            },
        }
    }

    /// Adds to the gradient of a source in its place: `write` is given its numbers and whether it is to add
    /// to what is there.
    ///
    /// # Safety
    /// Where it is not to add, `write` sets every number and reads none before.
    pub(super) unsafe fn write(
        &mut self,
        source: &Source,
        shape: impl Into<Shape>,
        write: impl FnOnce(&mut [f32], bool),
    ) -> Result<()> {
        let sum = match source {
            Source::Parameter(tensor) => self.gradients.slots.get_mut(&tensor.id()).map(|slot| &mut slot.gradient),
            Source::Node(node) => self.pending.get_mut(&node.number).map(|(_, gradient)| gradient),
        };
        if let Some(sum) = sum {
            write(sum.to_mut()?, true);
            return Ok(());
        }
        let shape = shape.into();
        // SAFETY: `write` sets every number, as the caller promises.
        let values = unsafe { written(shape.elem_count(), |values| write(values, false)) };
        self.add(source, Gradient::new(values, shape))
    }

    /// As [`write`](Self::write), always to add: a gradient that was not there is 0.
    pub(super) fn accumulate(
        &mut self,
        source: &Source,
        shape: impl Into<Shape>,
        add: impl FnOnce(&mut [f32]),
    ) -> Result<()> {
        // SAFETY: every number is cleared first.
        unsafe {
            self.write(source, shape, |values, accumulate| {
                if !accumulate {
                    update_chunks(values, |_, chunk| chunk.fill(0.0));
                }
                add(values);
            })
        }
    }

    /// Visits all operations.
    pub(super) fn run(&mut self) -> Result<()> {
        while let Some((number, (node, gradient))) = self.pending.pop_last() {
            match node.take() {
                Some(step) => step(gradient, self)?,
                None => crate::bail!("operation {number} was given a second backward pass"),
            }
        }
        Ok(())
    }
}

/// What losses are computed from, in candle's operations: values of a pass, as tensors whose gradients go on
/// into the pass.
#[derive(Debug, Default)]
pub struct Outputs {
    leaves: Vec<(Var, Source)>,
}

impl Outputs {
    /// A value as a tensor to compute a loss from.
    pub fn tensor(&mut self, value: &Value) -> Result<Tensor> {
        let Some(source) = value.source() else { return Ok(value.tensor().clone()) };
        let leaf = Var::from_tensor(value.tensor())?;
        let tensor = leaf.as_tensor().clone();
        self.leaves.push((leaf, source));
        Ok(tensor)
    }

    /// The gradients of a loss, a scalar.
    pub fn gradients(self, loss: &Tensor) -> Result<Gradients> {
        let mut gradients = Gradients::default();
        self.backward(loss, &mut gradients)?;
        Ok(gradients)
    }

    /// Adds the gradients of a loss, a scalar, to `gradients`: candle's backward pass gives those of the
    /// outputs, ours those of what they were computed from.
    pub fn backward(self, loss: &Tensor, gradients: &mut Gradients) -> Result<()> {
        let (leaves, sources): (Vec<Var>, Vec<Source>) = self.leaves.into_iter().unzip();
        let of_outputs = gradients.add_of_loss(loss, &leaves)?;
        let mut backward = Backward::new(gradients);
        for (source, gradient) in sources.iter().zip(of_outputs) {
            if let Some(gradient) = gradient {
                backward.add(source, gradient)?;
            }
        }
        drop(leaves);
        drop(sources);
        backward.run()?;
        let computed = gradients.take_computed();
        gradients.add_through_candle(computed)
    }
}

/// Runs a part of a pass without keeping what it computed: the backward pass runs it again (gradient
/// checkpointing, Chen et al. 2016).
///
/// `run` is given the inputs and whether it is run again; it reads no other value that an operation of the pass
/// gave. Run again it gives the same numbers, but for those of its result, which nothing reads then.
pub fn checkpoint(inputs: &[&Value], run: impl Fn(&[Value], bool) -> Result<Value> + Send + 'static) -> Result<Value> {
    let given: Vec<Value> = inputs.iter().map(|input| (*input).clone()).collect();
    let y = kept::without_counting(|| run(&given, false))?;
    if !y.is_tracked() {
        return Ok(y);
    }
    let inputs: Vec<(Tensor, Option<Source>)> =
        inputs.iter().map(|input| (input.tensor().clone(), input.source())).collect();
    // What it computed is freed here, with the history of `y`.
    kept::note(&inputs.iter().map(|(tensor, _)| tensor).collect::<Vec<_>>());
    Ok(Value::made(y.tensor().clone(), move |gradient, backward| {
        let found: Vec<Found> = inputs.iter().map(|_| Found::default()).collect();
        let leaf = |((tensor, source), found): (&(Tensor, Option<Source>), &Found)| match source {
            None => Value::constant(tensor.clone()),
            Some(_) => found.leaf(tensor.clone()),
        };
        let leaves: Vec<Value> = inputs.iter().zip(&found).map(leaf).collect();
        let y = run(&leaves, true)?;
        let mut again = Backward::new(backward.gradients);
        if let Some(source) = y.source() {
            again.add(&source, gradient)?;
        }
        drop((y, leaves));
        again.run()?;
        for ((_, source), found) in inputs.iter().zip(found) {
            if let (Some(source), Some(gradient)) = (source, found.take()) {
                backward.add(source, gradient)?;
            }
        }
        Ok(())
    }))
}

/// The gradient of an input of a part that is run again.
#[derive(Default)]
struct Found(Arc<Mutex<Option<Gradient>>>);

impl Found {
    /// The input, whose gradient comes here.
    fn leaf(&self, tensor: Tensor) -> Value {
        let place = self.0.clone();
        Value::made(tensor, move |gradient, _| {
            *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(gradient);
            Ok(())
        })
    }

    fn take(self) -> Option<Gradient> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

#[cfg(test)]
mod tests;
